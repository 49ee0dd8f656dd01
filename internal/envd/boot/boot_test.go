package boot

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestParseCmdline(t *testing.T) {
	t.Parallel()
	got := parseCmdline("console=ttyS0 root=/dev/vda rw wrenn.addr=172.31.255.2/30 x=a=b root=/dev/vdb\n")
	want := map[string]string{"console": "ttyS0", "root": "/dev/vdb", "rw": "", "wrenn.addr": "172.31.255.2/30", "x": "a=b"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v", got)
	}
}

func TestHostsWith(t *testing.T) {
	t.Parallel()
	got := hostsWith("127.0.0.1 localhost\n127.0.1.1 old\n10.0.0.1 mine", "new")
	if want := "127.0.0.1 localhost\n10.0.0.1 mine\n127.0.1.1 new\n"; got != want {
		t.Errorf("got %q", got)
	}
	if got := hostsWith("", "new"); !strings.Contains(got, "localhost") || !strings.HasSuffix(got, "127.0.1.1 new\n") {
		t.Errorf("got %q", got)
	}
	if again := hostsWith(got, "new"); again != got {
		t.Errorf("not the same twice: %q", again)
	}
}

func TestNewHostKeys(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "etc", "ssh")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := newHostKeys(dir, filepath.Join(dir, "no.pid")); err != nil {
		t.Fatal(err)
	}
	if made, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(made) > 0 {
		t.Errorf("a guest without keys got %v, %v", made, err)
	}
	if _, err := exec.LookPath("ssh-keygen"); err != nil {
		t.Skip("needs ssh-keygen")
	}
	key := filepath.Join(dir, "ssh_host_ed25519_key")
	for _, path := range []string{key, key + ".pub"} {
		if err := os.WriteFile(path, []byte("of the original"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := newHostKeys(dir, filepath.Join(dir, "no.pid")); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{key, key + ".pub"} {
		if b, err := os.ReadFile(path); err != nil || strings.Contains(string(b), "original") {
			t.Errorf("%s: %q, %v", filepath.Base(path), b, err)
		}
	}
}

func TestReplaceFileDoesNotFollowLinks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	victim, link := filepath.Join(dir, "victim"), filepath.Join(dir, "link")
	if err := os.WriteFile(victim, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(victim, link); err != nil {
		t.Fatal(err)
	}
	if err := replaceFile(link, "new", 0o444); err != nil {
		t.Fatal(err)
	}
	if raw, err := os.ReadFile(victim); err != nil || string(raw) != "kept" {
		t.Errorf("the link was followed: %q %v", raw, err)
	}
	if st, err := os.Lstat(link); err != nil || st.Mode() != 0o444 {
		t.Errorf("%v %v", st, err)
	}
}

func superblock(blocks uint64, shift uint32, magic uint16) []byte {
	b := make([]byte, 1024)
	binary.LittleEndian.PutUint32(b[4:], uint32(blocks))
	binary.LittleEndian.PutUint32(b[0x18:], shift)
	binary.LittleEndian.PutUint16(b[0x38:], magic)
	binary.LittleEndian.PutUint32(b[0x60:], 0x80)
	binary.LittleEndian.PutUint32(b[0x150:], uint32(blocks>>32))
	return b
}

func TestParseSuperblock(t *testing.T) {
	t.Parallel()
	blocks, size, err := parseSuperblock(superblock(1<<33+5, 2, 0xef53))
	if err != nil || blocks != 1<<33+5 || size != 4096 {
		t.Errorf("%d %d %v", blocks, size, err)
	}
	for _, bad := range [][]byte{nil, make([]byte, 1024), superblock(1, 99, 0xef53), superblock(1, 2, 0x1234)} {
		if _, _, err := parseSuperblock(bad); err == nil {
			t.Error("taken for an ext4 superblock")
		}
	}
}

func FuzzParseSuperblock(f *testing.F) {
	f.Add(superblock(524288, 2, 0xef53))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, size, err := parseSuperblock(b); err == nil && (size < 1024 || size > 64<<10) {
			t.Errorf("block size %d", size)
		}
	})
}

func FuzzHostsWith(f *testing.F) {
	f.Add("127.0.0.1 localhost\n", "name")
	f.Fuzz(func(t *testing.T, hosts, name string) {
		once := hostsWith(hosts, "fixed")
		if hostsWith(once, "fixed") != once {
			t.Errorf("not the same twice: %q", once)
		}
	})
}
