package envd

import (
	"strings"
	"testing"
)

func FuzzInitBody(f *testing.F) {
	f.Add([]byte(`{"hostname":"sb1","machineId":"0123456789abcdef0123456789abcdef","entropy":"AAEC","nameservers":["1.2.3.4"],"timestamp":"2026-01-01T00:00:00Z"}`))
	f.Add([]byte(`{"envVars":{"A":"b"}}`))
	f.Add([]byte(` `))
	f.Fuzz(func(t *testing.T, raw []byte) {
		b, id, err := parseInit(raw)
		if err != nil {
			return
		}
		if len(id.Hostname) > 63 || strings.ContainsAny(id.Hostname, "\n /.") || len(id.Entropy) > maxEntropy || len(id.Nameservers) > maxNameservers {
			t.Errorf("taken: %+v", id)
		}
		if id.MachineID != "" && len(id.MachineID) != 32 {
			t.Errorf("machine id %q", id.MachineID)
		}
		for k, v := range b.EnvVars {
			if k == "" || strings.ContainsAny(k, "=\x00") || strings.ContainsRune(v, 0) {
				t.Errorf("variable %q=%q", k, v)
			}
		}
	})
}

func TestParseStat(t *testing.T) {
	t.Parallel()
	busy, all, err := parseStat(strings.NewReader("cpu  10 1 5 100 4 2 3 1 0 0\ncpu0 1 2\n"))
	if err != nil || busy != 22 || all != 126 {
		t.Errorf("%d %d %v", busy, all, err)
	}
	for _, bad := range []string{"", "cpu 1 2\n", "cpu a b c d e f g h\n", "intr 1 2 3 4 5 6 7 8\n"} {
		if _, _, err := parseStat(strings.NewReader(bad)); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestParseMeminfo(t *testing.T) {
	t.Parallel()
	m, err := parseMeminfo(strings.NewReader("MemTotal: 2048 kB\nMemFree: 1 kB\nMemAvailable: 1024 kB\nCached: 16 kB\n"))
	if err != nil || m != (meminfo{total: 2 << 20, available: 1 << 20, cached: 16 << 10}) {
		t.Errorf("%+v %v", m, err)
	}
	if _, err := parseMeminfo(strings.NewReader("MemTotal: 1 kB\nMemAvailable: 2 kB\n")); err == nil {
		t.Error("more available than there is")
	}
}

func TestParseRegions(t *testing.T) {
	t.Parallel()
	const smaps = `c000000000-c000400000 rw-p 00000000 00:00 0                              [anon: Go: heap]
Size:               4096 kB
AnonHugePages:      2048 kB
00400000-00500000 r-xp 00000000 08:01 123                                /bin/x
AnonHugePages:      2048 kB
7f0000000000-7f0000200000 rw-p 00000000 00:00 0
AnonHugePages:         0 kB
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
`
	got, err := parseRegions(strings.NewReader(smaps))
	if err != nil || len(got) != 2 || got[0] != (region{0xc000000000, 0xc000400000, 1}) || got[1] != (region{0x7f0000000000, 0x7f0000200000, 0}) {
		t.Errorf("%+v %v", got, err)
	}
}
