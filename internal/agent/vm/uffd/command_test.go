//go:build linux

package uffd

import (
	"bytes"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// greet sends each part, with so many descriptors each, and returns what is received.
func greet(t *testing.T, descriptors []int, parts ...[]byte) ([]byte, int, error) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	done := make(chan struct{})
	go func() { // a long greeting waits for its reader
		defer close(done)
		defer unix.Close(pair[0])
		for i, part := range parts {
			var rights []byte
			if i < len(descriptors) && descriptors[i] > 0 {
				rights = unix.UnixRights(make([]int, descriptors[i])...) // standard input, again and again
			}
			if err := unix.Sendmsg(pair[0], part, rights, nil, unix.MSG_NOSIGNAL); err != nil {
				return
			}
		}
	}()
	said, fd, err := receive(pair[1])
	unix.Close(pair[1])
	<-done
	return said, fd, err
}

func TestGreetingsOfAHostileVMMAreRefused(t *testing.T) {
	t.Parallel()
	hello := []byte(`[{"size":1}]`)
	for name, c := range map[string]struct {
		descriptors []int
		parts       [][]byte
	}{
		"nothing":                        {nil, nil},
		"no descriptor":                  {nil, [][]byte{hello}},
		"two descriptors":                {[]int{2}, [][]byte{hello}},
		"a hundred descriptors":          {[]int{100}, [][]byte{hello}},
		"a descriptor with each part":    {[]int{1, 1}, [][]byte{hello[:3], hello[3:]}},
		"a part":                         {[]int{1}, [][]byte{hello[:3]}},
		"very much that never is a list": {[]int{1}, [][]byte{bytes.Repeat([]byte("["), 2*helloLimit)}},
	} {
		if said, _, err := greet(t, c.descriptors, c.parts...); err == nil {
			t.Errorf("%s: taken as %q", name, said)
		}
	}
	for name, parts := range map[string][][]byte{"at once": {hello}, "in parts": {hello[:3], hello[3:5], hello[5:]}} {
		said, fd, err := greet(t, []int{1}, parts...)
		if err != nil || !bytes.Equal(said, hello) || fd < 3 {
			t.Errorf("%s: %q, descriptor %d, %v", name, said, fd, err)
		}
		unix.Close(fd)
	}
}

// TestADescriptorThatIsNoUserfaultfdEndsTheServer, and with it the VMM that sent it.
func TestADescriptorThatIsNoUserfaultfdEndsTheServer(t *testing.T) {
	t.Parallel()
	fault := make([]byte, messageSize)
	fault[0] = eventPageFault
	for name, sent := range map[string][]byte{"noise": bytes.Repeat([]byte("noise"), 100), "a message": fault, "an end": {}} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(sent); err != nil {
			t.Fatal(err)
		}
		w.Close()
		self, err := unix.PidfdOpen(os.Getpid(), 0)
		if err != nil {
			t.Fatal(err)
		}
		s := &server{
			uffd: userfault(r.Fd()), client: self, memory: make([]byte, fileSize), zero: newBitmap(fileSize / pageSize), regions: []region{{0, fileSize, 0}},
		}
		if err := s.serve(); err == nil {
			t.Errorf("%s: served", name)
		}
		r.Close()
		unix.Close(self)
	}
}
