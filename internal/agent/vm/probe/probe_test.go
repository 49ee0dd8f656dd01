package probe

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"
)

type verdict struct{ Works bool }

// change rewrites what is kept in a file.
func change(t *testing.T, path string, fn func(*cached[verdict])) {
	t.Helper()
	var c cached[verdict]
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	if err != nil {
		t.Fatal(err)
	}
	fn(&c)
	if b, err = json.Marshal(c); err == nil {
		err = os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestAVerdictThatSomethingFailedExpires(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		works  bool
		change func(*cached[verdict])
		holds  bool
	}{
		"it works":                   {true, func(*cached[verdict]) {}, true},
		"it fails":                   {false, func(*cached[verdict]) {}, true},
		"it failed long ago":         {false, func(c *cached[verdict]) { c.Until = time.Now().Add(-time.Second) }, false},
		"it failed before a boot":    {false, func(c *cached[verdict]) { c.Boot = "another" }, false},
		"the clock was set back":     {false, func(c *cached[verdict]) { c.Until = time.Now().Add(Retry + time.Hour) }, false},
		"another kernel":             {true, func(c *cached[verdict]) { c.Key = "another" }, false},
		"half of what a failure has": {false, func(c *cached[verdict]) { c.Until = time.Time{} }, false},
	} {
		path := filepath.Join(t.TempDir(), "verdict")
		if err := Keep(path, "key", c.works, verdict{c.works}); err != nil {
			t.Fatal(err)
		}
		change(t, path, c.change)
		if got, ok := Cached[verdict](path, "key"); ok != c.holds || ok && got.Works != c.works {
			t.Errorf("%s: %+v, holds: %v, want %v", name, got, ok, c.holds)
		}
	}
	if _, ok := Cached[verdict](filepath.Join(t.TempDir(), "absent"), "key"); ok {
		t.Error("a verdict that nobody gave holds")
	}
}
