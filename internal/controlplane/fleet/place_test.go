package fleet

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"pgregory.net/rapid"
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
		req := Request{Resources{rapid.Int64Range(1, 10).Draw(t, "v"), rapid.Int64Range(1, 10).Draw(t, "m"), rapid.Int64Range(1, 10).Draw(t, "d")}, "minimal"}
		id, reason := Place(req, hosts)
		var fitting []Candidate
		for _, h := range hosts {
			if fits(h, req) {
				fitting = append(fitting, h)
			}
		}
		if (id == "") != (len(fitting) == 0) || (id == "") == (reason == "") {
			t.Fatalf("chose %q (%s) of %d that fit", id, reason, len(fitting))
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
	if id, _ := Place(Request{Resources{1, 512, 2048}, "minimal"}, hosts); id != "host-a" {
		t.Errorf("chose %s", id)
	}
}

func TestPlaceTellsWhy(t *testing.T) {
	t.Parallel()
	if _, why := Place(Request{}, nil); !strings.Contains(why, "no host is online") {
		t.Error(why)
	}
	hosts := []Candidate{{ID: "a", HasTemplate: true, FreeMemoryMB: -1, FreeDiskMB: -1, Capacity: Resources{1, 1, 1}}, {ID: "b"}}
	_, why := Place(Request{Resources{1, 100, 1}, "base"}, hosts)
	if !strings.Contains(why, "1 × no template") || !strings.Contains(why, "1 × not enough memory") {
		t.Error(why)
	}
}
