package fleet

import (
	"encoding/json"
	"fmt"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/db"
	"github.com/wrenn-sandbox/wrenn/internal/gen/agentv1"
)

// Needs is what saved memory was made by: it runs only where all of it is the same.
type Needs struct {
	Driver       string `json:"driver,omitempty"`
	VMMVersion   string `json:"vmm_version,omitempty"`
	Acceleration string `json:"acceleration,omitempty"`
	Arch         string `json:"arch,omitempty"`
	CPUModel     string `json:"cpu_model,omitempty"`
}

// lacks says what a host lacks, "" if nothing: one of what it has must be all that is needed. What a host
// did not report is not held against it: its agent looks again.
func (n Needs) lacks(has []Needs) (why string) {
	for i, one := range has {
		this := n.differs(one)
		if this == "" {
			return ""
		}
		if i == 0 || one.Driver == n.Driver {
			why = this
		}
	}
	return why
}

func (n Needs) differs(has Needs) string {
	for _, p := range []struct{ what, need, have string }{
		{"hypervisor", n.Driver, has.Driver}, {n.Driver + " version", n.VMMVersion, has.VMMVersion}, {"acceleration", n.Acceleration, has.Acceleration},
		{"architecture", n.Arch, has.Arch}, {"CPU", n.CPUModel, has.CPUModel},
	} {
		if p.need != "" && p.have != "" && p.need != p.have {
			return fmt.Sprintf("saved memory needs %s %s, not %s", p.what, p.need, p.have)
		}
	}
	return ""
}

// hostHas is what a host offers to saved memory.
func hostHas(h db.Host) []Needs {
	var all []Needs
	if json.Unmarshal(h.Hypervisors, &all) == nil && len(all) > 0 {
		return all
	}
	versions := map[string]string{}
	_ = json.Unmarshal(h.Versions, &versions) // written from a map of strings
	return []Needs{{                          // an older agent
		Driver: deref(h.Driver), VMMVersion: versions["vmm"], Acceleration: deref(h.Acceleration), Arch: deref(h.Arch), CPUModel: deref(h.CPUModel),
	}}
}

// needsOf turns what an agent says into a row's JSON; nil if there is no memory.
func needsOf(n *agentv1.Needs) json.RawMessage {
	if n == nil {
		return nil
	}
	raw, err := json.Marshal(Needs{n.GetDriver(), n.GetVmmVersion(), n.GetAcceleration(), n.GetArch(), n.GetCpuModel()})
	if err != nil {
		return nil
	}
	return raw
}

func readNeeds(raw json.RawMessage) (n Needs, err error) {
	if len(raw) > 0 {
		err = json.Unmarshal(raw, &n)
	}
	return n, err
}
