package wrenn

// HostStatus is what the control plane knows of a host.
//
//	pending ──register──► online ◄──heartbeat / 90 s of silence──► offline
type HostStatus string

const (
	HostPending HostStatus = "pending"
	HostOnline  HostStatus = "online"
	HostOffline HostStatus = "offline"
)

// HostType says who may be placed on a host: `regular` hosts are the platform's and shared, `byoc`
// hosts belong to one team.
type HostType string

const (
	HostRegular HostType = "regular"
	HostBYOC    HostType = "byoc"
)
