// Package agent is the host agent: it owns what really runs on one host. It creates, adopts and removes
// sandboxes with a vm.Driver, keeps a record of each on disk before it acts, serves the control plane's
// RPC and passes its traffic through to the guests.
//
// VMs outlive the agent: everything in memory can be found again from the records (see adopt.go). It
// must not know of teams, users or SQL, and must not import the control plane.
package agent
