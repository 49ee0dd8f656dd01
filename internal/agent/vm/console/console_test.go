package console

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
)

func TestConsoleLogKeepsTheEnd(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "console.log")
	if err := os.WriteFile(path, []byte("of an earlier life\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.file.Close()
	line := bytes.Repeat([]byte("x"), 999)
	for i := range 3000 {
		line[0] = byte('a' + i%26)
		if err := l.append(append(line, '\n')); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			if b, _ := os.ReadFile(path); !bytes.HasPrefix(b, []byte("of an earlier life\n")) {
				t.Error("what was there was not kept")
			}
		}
		if fi, err := os.Stat(path); err != nil || fi.Size() > vm.ConsoleLimit {
			t.Fatalf("%d bytes, %v", fi.Size(), err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil || len(b) < vm.ConsoleLimit/2-1000 || !bytes.HasSuffix(b, append(line, '\n')) {
		t.Errorf("%d bytes are left, %v", len(b), err)
	}
	if len(b)%1000 != 0 {
		t.Error("the log begins in the middle of a line")
	}
}
