//go:build linux

package vmproc

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// prisoner makes this test program look around in its jail instead of testing.
const prisoner = "look-around"

// lookAround prints what a process can see and do, a word and its answer per line.
func lookAround() {
	say := func(words ...string) { _, _ = io.WriteString(os.Stdout, strings.Join(words, " ")+"\n") }
	entries := func(dir string) string {
		list, err := os.ReadDir(dir)
		if err != nil {
			return "hidden"
		}
		var names []string
		for _, e := range list {
			names = append(names, e.Name())
		}
		return strings.Join(names, ",")
	}
	tried := func(err error) string {
		if err != nil {
			return "no"
		}
		return "yes"
	}
	say("root", entries("/"))
	say("dev", entries("/dev"))
	say("proc", entries("/proc"))
	say("pid", strconv.Itoa(os.Getpid()))
	_, err := os.ReadFile("/given")
	say("read-given", tried(err))
	say("write-given", tried(os.WriteFile("/given", []byte("changed"), 0)))
	say("write-own", tried(os.WriteFile("/own/file", nil, 0o600)))
	say("write-root", tried(os.WriteFile("/file", nil, 0o600)))
	say("mount", tried(unix.Mount("none", "/own", "tmpfs", 0, "")))
	say("unshare", tried(unix.Unshare(unix.CLONE_NEWNS)))
	say("chroot", tried(unix.Chroot("/own")))
	say("mknod", tried(unix.Mknod("/own/mem", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 1)))))
	say("setuid", tried(unix.Setuid(0)))
	say("up", entries("/../../../.."))
	say("done")
	_, _ = io.Copy(io.Discard, os.NewFile(3, "hold")) // until the test has looked from outside
}

func TestJailHoldsWhatItIsGivenAndNothingElse(t *testing.T) {
	t.Parallel()
	needRoot(t)
	const device = "/dev/loop-control"
	before, err := os.Stat(device)
	if err != nil {
		t.Skipf("this machine has no %s to test with", device)
	}
	dir, given := t.TempDir(), filepath.Join(t.TempDir(), "given")
	if err := os.WriteFile(given, []byte("x"), 0o666); err != nil {
		t.Fatal(err)
	}
	out, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	hold, release, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p, err := Launch(Spec{
		Path: "/test", Args: []string{prisoner}, Stdout: theirs, Files: []*os.File{hold}, UID: 700_903, GID: 700_903,
		Jail: &Jail{
			Dir: dir, Folders: []string{"/own"}, Devices: []string{device}, Proc: true,
			Binds: []Bind{{From: os.Args[0], To: "/test"}, {From: given, To: "/given"}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	hold.Close()
	said := answers(t, out)
	var st unix.Stat_t
	if err := unix.Stat(p.Path(device), &st); err != nil || st.Uid != 700_903 || st.Mode&0o777 != 0o600 {
		t.Errorf("the process's device belongs to %d, mode %o, %v", st.Uid, st.Mode, err)
	}
	if err := unix.Stat(p.Path("/etc"), &st); err == nil {
		t.Error("the jail has the host's /etc")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("the host sees %v in the jail's directory, %v", entries, err)
	}
	release.Close()
	if err := p.Wait(context.Background()); err != nil {
		t.Error(err)
	}
	if err := p.Reap(); err != nil {
		t.Error(err)
	}
	for word, want := range map[string]string{
		"root": "hidden", "up": "hidden", "dev": "hidden", "pid": "1", "read-given": "yes", "write-own": "yes",
		"write-given": "no", "write-root": "no", "mount": "no", "unshare": "no", "chroot": "no", "mknod": "no", "setuid": "no",
	} {
		if said[word] != want {
			t.Errorf("%s: %q, want %q", word, said[word], want)
		}
	}
	// The program sees itself under the host's number, and nothing else: no other process, no settings.
	if seen := strings.Split(said["proc"], ","); !slices.Equal(seen, []string{strconv.Itoa(p.PID), "self", "thread-self"}) {
		t.Errorf("/proc has %v", seen)
	}
	after, err := os.Stat(device)
	if err != nil || after.Mode() != before.Mode() {
		t.Errorf("the host's device is now %v, %v", after.Mode(), err)
	}
}

func answers(t *testing.T, from *os.File) map[string]string {
	t.Helper()
	defer from.Close()
	var text []byte
	buf := make([]byte, 4096)
	for !strings.HasSuffix(string(text), "done\n") {
		n, err := from.Read(buf)
		if err != nil {
			t.Fatalf("the process said %q and ended: %v", text, err)
		}
		text = append(text, buf[:n]...)
	}
	said := map[string]string{}
	for line := range strings.Lines(string(text)) {
		word, answer, _ := strings.Cut(strings.TrimSpace(line), " ")
		said[word] = answer
	}
	return said
}
