package fleet

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

func genResources(t *rapid.T, label string, most int64) Resources {
	g := rapid.Int64Range(0, most)
	return Resources{g.Draw(t, label+".vcpus"), g.Draw(t, label+".memory"), g.Draw(t, label+".disk")}
}

func genCandidates(t *rapid.T) []Candidate {
	n := rapid.IntRange(0, 8).Draw(t, "hosts")
	hosts := make([]Candidate, n)
	for i := range hosts {
		hosts[i] = Candidate{
			ID: fmt.Sprintf("host-%d", i), Own: rapid.Bool().Draw(t, "own"), Draining: rapid.IntRange(0, 4).Draw(t, "draining") == 0,
			HasTemplate: rapid.IntRange(0, 4).Draw(t, "lacks") != 0, Capacity: genResources(t, "capacity", 40), Reserved: genResources(t, "reserved", 20),
			Sandboxes: rapid.Int64Range(0, 4).Draw(t, "sandboxes"), Limit: rapid.Int64Range(0, 4).Draw(t, "limit"),
			FreeMemoryMB: rapid.Int64Range(-1, 40).Draw(t, "free"), FreeDiskMB: rapid.Int64Range(-1, 2*minFreeDiskMB).Draw(t, "freeDisk"),
		}
	}
	return hosts
}

// fits says again, in other words, what a host must have.
func fits(h Candidate, r Request) bool {
	return h.HasTemplate && !h.Draining && (h.Limit == 0 || h.Sandboxes+1 <= h.Limit) &&
		h.Capacity.VCPUs-h.Reserved.VCPUs >= r.VCPUs && h.Capacity.MemoryMB-h.Reserved.MemoryMB >= r.MemoryMB && h.Capacity.DiskMB-h.Reserved.DiskMB >= r.DiskMB &&
		(h.FreeMemoryMB < 0 || h.FreeMemoryMB >= r.MemoryMB) && (h.FreeDiskMB < 0 || h.FreeDiskMB >= minFreeDiskMB)
}

func TestPlaceProperties(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		hosts := genCandidates(t)
		req := Request{Resources: Resources{rapid.Int64Range(1, 10).Draw(t, "v"), rapid.Int64Range(1, 10).Draw(t, "m"), rapid.Int64Range(1, 10).Draw(t, "d")}, Template: "minimal"}
		id, refusal := Place(req, hosts)
		var fitting []Candidate
		for _, h := range hosts {
			if fits(h, req) {
				fitting = append(fitting, h)
			}
		}
		if (id == "") != (len(fitting) == 0) || (id == "") == (refusal == nil) {
			t.Fatalf("chose %q (%v) of %d that fit", id, refusal, len(fitting))
		}
		shuffled := append([]Candidate{}, hosts...)
		rand.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if again, _ := Place(req, shuffled); again != id {
			t.Fatalf("chose %q, in another order %q", id, again)
		}
		for _, h := range fitting {
			if h.ID == id {
				for _, other := range fitting {
					if other.Own && !h.Own {
						t.Fatalf("chose %s though %s is the team's own", id, other.ID)
					}
				}
				return
			}
		}
		if id != "" {
			t.Fatalf("chose %s, which does not fit", id)
		}
	})
}

func TestPlaceSpreads(t *testing.T) {
	t.Parallel()
	capacity := Resources{32, 32000, 320000}
	hosts := []Candidate{
		{ID: "host-a", HasTemplate: true, Capacity: capacity, Reserved: Resources{4, 2000, 2000}, FreeMemoryMB: -1, FreeDiskMB: -1},
		{ID: "host-b", HasTemplate: true, Capacity: capacity, Reserved: Resources{1, 16000, 2000}, FreeMemoryMB: -1, FreeDiskMB: -1},
	}
	if id, _ := Place(Request{Resources: Resources{1, 512, 2048}, Template: "minimal"}, hosts); id != "host-a" {
		t.Errorf("chose %s", id)
	}
}

func TestPlaceTellsWhy(t *testing.T) {
	t.Parallel()
	needs := Needs{Driver: "qemu", VMMVersion: "7.2", CPUModel: "a"}
	room := Candidate{ID: "a", HasTemplate: true, FreeMemoryMB: -1, FreeDiskMB: -1, Capacity: Resources{4, 400, 4}, Has: []Needs{needs}}
	with := func(change func(*Candidate)) Candidate { c := room; change(&c); return c }
	full := with(func(c *Candidate) { c.FreeDiskMB = 17 })
	for name, tc := range map[string]struct {
		req   Request
		hosts []Candidate
		kind  wrenn.Kind
		say   []string
	}{
		"no host":            {Request{}, nil, wrenn.KindNoCapacity, []string{"no host is online"}},
		"several reasons":    {Request{Resources: Resources{1, 500, 1}}, []Candidate{room, {ID: "b"}}, wrenn.KindNoCapacity, []string{"1 × no template", "1 × not enough memory"}},
		"full disks":         {Request{Resources: Resources{1, 1, 1}}, []Candidate{full, {ID: "b"}}, wrenn.KindDiskFull, []string{"17 MB", "512 MB"}},
		"full disk and more": {Request{Resources: Resources{5, 1, 1}}, []Candidate{full, room}, wrenn.KindNoCapacity, []string{"2 × not enough vCPUs"}},
		"a resume":           {Request{Resources: Resources{1, 500, 0}, Resume: true}, []Candidate{room}, wrenn.KindNoCapacity, []string{"it lacks 100 MB of memory;"}},
		"a fork":             {Request{Resources: Resources{6, 1, 5}, Saved: true}, []Candidate{room}, wrenn.KindNoCapacity, []string{"it lacks 2 vCPUs and 1 MB of disk;"}},
		"a resume, full":     {Request{Resources: Resources{1, 1, 0}, Resume: true}, []Candidate{full}, wrenn.KindDiskFull, []string{"17 MB"}},
		"another VMM": {Request{Resources: Resources{1, 1, 0}, Resume: true, Needs: Needs{Driver: "qemu", VMMVersion: "8.0"}}, []Candidate{room},
			wrenn.KindNoCapacity, []string{"qemu version 8.0, not 7.2"}},
		"another CPU": {Request{Resources: Resources{1, 1, 1}, Saved: true, Needs: Needs{CPUModel: "b"}}, []Candidate{room}, wrenn.KindNoCapacity, []string{"CPU b, not a"}},
		"draining": {Request{Resources: Resources{1, 1, 1}, Saved: true}, []Candidate{with(func(c *Candidate) { c.Draining = true })}, wrenn.KindNoCapacity,
			[]string{"draining"}},
	} {
		id, refusal := Place(tc.req, tc.hosts)
		if id != "" || refusal == nil || refusal.Kind != tc.kind {
			t.Errorf("%s: %q, %v; want %s", name, id, refusal, tc.kind)
			continue
		}
		for _, want := range tc.say {
			if !strings.Contains(refusal.Message, want) {
				t.Errorf("%s: %q does not say %q", name, refusal.Message, want)
			}
		}
	}
	for name, req := range map[string]Request{
		"what is there already goes on while the host drains": {Resources: Resources{1, 1, 0}, Resume: true},
		"and takes no more disk":                              {Resources: Resources{1, 1, 100}, Resume: true},
	} {
		if id, refusal := Place(req, []Candidate{with(func(c *Candidate) { c.Draining = true })}); id == "" {
			t.Errorf("%s: %v", name, refusal)
		}
	}
	if id, refusal := Place(Request{Resources: Resources{1, 1, 1}, Saved: true, Needs: needs}, []Candidate{with(func(c *Candidate) { c.Has = nil })}); id == "" {
		t.Errorf("a host that did not say what it has: %v", refusal)
	}
}

// A host with several hypervisors runs what either of them saved, and says of the one that comes closest
// what differs.
func TestNeedsOfSeveralHypervisors(t *testing.T) {
	t.Parallel()
	has := []Needs{{Driver: "firecracker", VMMVersion: "1.9"}, {Driver: "qemu", VMMVersion: "7.2"}}
	for _, n := range append(has, Needs{}) {
		if why := n.lacks(has); why != "" {
			t.Errorf("%+v: %s", n, why)
		}
	}
	if why := (Needs{Driver: "qemu", VMMVersion: "8"}).lacks(has); why != "saved memory needs qemu version 8, not 7.2" {
		t.Error(why)
	}
	if why := (Needs{Driver: "other"}).lacks(has); why == "" {
		t.Error("an unknown hypervisor fits")
	}
}

// Every case of a saved moment, on its own.
func TestJudgeMoment(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		row        *MomentRow
		has        Presence
		checkpoint bool
		want       MomentAction
	}{
		"unknown checkpoint":                   {nil, Present, true, MomentAdopt},
		"unknown snapshot":                     {nil, Present, false, ""},
		"deleted and gone":                     {&MomentRow{Deleted: true, Status: momentDeleting}, Absent, true, ""},
		"deleted and still there":              {&MomentRow{Deleted: true, Status: momentDeleting}, Present, true, MomentRemove},
		"still being saved":                    {&MomentRow{Status: momentSaving, Due: true}, Saving, true, ""},
		"not wanted any more, but being saved": {&MomentRow{Deleted: true, Status: momentSaving}, Saving, true, ""},
		"nobody's, being saved":                {nil, Saving, true, ""},
		"being saved":                          {&MomentRow{Status: momentSaving}, Absent, true, ""},
		"saved, nobody heard":                  {&MomentRow{Status: momentSaving, Due: true}, Present, true, MomentFinish},
		"never saved":                          {&MomentRow{Status: momentSaving, Due: true}, Absent, true, MomentDrop},
		"being deleted":                        {&MomentRow{Status: momentDeleting}, Present, true, ""},
		"delete was cut off":                   {&MomentRow{Status: momentDeleting, Due: true}, Present, true, MomentRemove},
		"delete was cut off at its end":        {&MomentRow{Status: momentDeleting, Due: true}, Absent, true, MomentRemove},
		"deleted while it is in use":           {&MomentRow{Status: momentDeleting, Due: true, InUse: true}, Present, false, ""},
		"there":                                {&MomentRow{Status: momentReady}, Present, true, ""},
		"lost":                                 {&MomentRow{Status: momentReady}, Absent, true, MomentLost},
		"lost, as was known":                   {&MomentRow{Status: momentReady, Missing: true}, Absent, true, ""},
		"found again":                          {&MomentRow{Status: momentReady, Missing: true}, Present, true, MomentFound},
	} {
		if got := JudgeMoment(tc.row, tc.has, tc.checkpoint); got != tc.want {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
}
