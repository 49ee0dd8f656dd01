package account

import (
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func database(t testing.TB, passwd, group string) Database {
	t.Helper()
	dir := t.TempDir()
	db := Database{Passwd: filepath.Join(dir, "passwd"), Group: filepath.Join(dir, "group")}
	for path, content := range map[string]string{db.Passwd: passwd, db.Group: group} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return db
}

const passwd = "root:x:0:0:root:/root:/bin/bash\n# comment\nbroken:x:1\nbad:x:NaN:0::/:/bin/sh\nann:x:1000:1000:Ann,,,:/home/ann:/bin/zsh\nbare:x:7:8:::\n"
const group = "root:x:0:\nann:x:1000:\nsudo:x:27:bob,ann\nann2:x:1001:annabel\ndocker:x:999:ann\n"

func TestLookup(t *testing.T) {
	t.Parallel()
	db := database(t, passwd, group)
	got, err := db.Lookup("ann")
	want := Account{Name: "ann", UID: 1000, GID: 1000, Groups: []uint32{1000, 27, 999}, Home: "/home/ann", Shell: "/bin/zsh"}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v %v", got, err)
	}
	got, err = db.Lookup("bare")
	if err != nil || got.Home != "/" || got.Shell != "/bin/sh" || !reflect.DeepEqual(got.Groups, []uint32{8}) {
		t.Errorf("got %+v %v", got, err)
	}
	for _, name := range []string{"", "nobody", "broken", "bad", "ann:x", "ann\n", "an", strings.Repeat("a", 33)} {
		if got, err := db.Lookup(name); !errors.Is(err, ErrUnknown) {
			t.Errorf("Lookup(%q) = %+v, %v", name, got, err)
		}
	}
	if _, err := (Database{Passwd: "/no/such", Group: "/no/such"}).Lookup("ann"); err == nil || errors.Is(err, ErrUnknown) {
		t.Errorf("without a database: %v", err)
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	n := database(t, passwd, group).Names()
	if n.User(1000) != "ann" || n.User(4242) != "4242" || n.Group(27) != "sudo" || n.Group(4242) != "4242" {
		t.Errorf("%q %q %q %q", n.User(1000), n.User(4242), n.Group(27), n.Group(4242))
	}
}

func TestFromHeader(t *testing.T) {
	t.Parallel()
	enc := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	for header, want := range map[string]string{"": "", "Basic " + enc("ann:"): "ann", "basic " + enc("ann:password"): "ann", "Basic " + enc("a:b:c"): "a"} {
		if got, err := FromHeader(header); got != want || err != nil {
			t.Errorf("FromHeader(%q) = %q, %v", header, got, err)
		}
	}
	for _, header := range []string{"Basic", "Basic !!!", "Bearer " + enc("ann:"), "Basic " + enc("ann"), "Basic " + enc(":"), "Basic " + enc(strings.Repeat("a", 40)+":"), "Basic " + strings.Repeat("QUFB", 1000)} {
		if got, err := FromHeader(header); !errors.Is(err, ErrBadHeader) {
			t.Errorf("FromHeader(%.40q) = %q, %v", header, got, err)
		}
	}
}

func FuzzFromHeader(f *testing.F) {
	f.Add("Basic YW5uOg==")
	f.Add("")
	f.Fuzz(func(t *testing.T, header string) {
		name, err := FromHeader(header)
		if err == nil && name == "" && header != "" {
			t.Errorf("%q names nobody and is no error", header)
		}
		if len(name) > maxName || strings.Contains(name, ":") {
			t.Errorf("%q gave %q", header, name)
		}
	})
}

func FuzzDatabase(f *testing.F) {
	f.Add("ann:x:1:1::/:/bin/sh\n", "g:x:2:ann\n", "ann")
	f.Fuzz(func(t *testing.T, passwd, group, name string) {
		db := database(t, passwd, group)
		got, err := db.Lookup(name)
		if err == nil && (got.Name != name || got.Home == "" || got.Shell == "" || len(got.Groups) == 0) {
			t.Errorf("%+v", got)
		}
		db.Names()
	})
}
