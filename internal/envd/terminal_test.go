package envd

import (
	"context"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	processpb "github.com/wrenn-sandbox/wrenn/internal/gen/process"
)

func TestTerminalInputStopsWithItsDeadline(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	msg := bash("stty raw -echo; echo ready; sleep 300")
	msg.Pty = &processpb.PTY{}
	stream, sel := a.begin(t, cancelContext(t), msg)
	defer stream.Close()
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	in := &processpb.ProcessInput{Input: &processpb.ProcessInput_Pty{Pty: []byte(strings.Repeat("x", 1<<20))}}
	_, err := a.process.SendInput(ctx, connect.NewRequest(&processpb.SendInputRequest{Process: sel, Input: in}))
	wantCode(t, err, connect.CodeDeadlineExceeded, "")
	a.signal(t, sel, 9)
	eventually(t, "the process leaves the table", func() bool {
		list, err := a.process.List(testContext(t), connect.NewRequest(&processpb.ListRequest{}))
		return err == nil && len(list.Msg.GetProcesses()) == 0
	})
}

func TestTerminalEndsBesideABackgroundChild(t *testing.T) {
	t.Parallel()
	msg := bash("trap '' HUP; sleep 300 & echo $!")
	msg.Pty = &processpb.PTY{}
	r := newAgent(t).run(t, msg)
	pid, err := strconv.Atoi(strings.TrimSpace(r.pty))
	if err != nil || r.end.GetExitCode() != 0 {
		t.Fatalf("got %+v", r)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Errorf("the child did not live on: %v", err)
	}
}

func TestTerminal(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	ctx := cancelContext(t)
	msg := bash(`tty; stty size; read x; stty size; echo "$TERM $x"`)
	msg.Pty = &processpb.PTY{Size: &processpb.PTY_Size{Cols: 100, Rows: 40}}
	stream, sel := a.begin(t, ctx, msg)
	var seen strings.Builder
	for !strings.Contains(seen.String(), "40 100") && stream.Receive() {
		seen.Write(stream.Msg().GetEvent().GetData().GetPty())
	}
	if _, err := a.process.Update(ctx, connect.NewRequest(&processpb.UpdateRequest{Process: sel, Pty: &processpb.PTY{Size: &processpb.PTY_Size{Cols: 120, Rows: 50}}})); err != nil {
		t.Fatal(err)
	}
	_, err := a.process.CloseStdin(ctx, connect.NewRequest(&processpb.CloseStdinRequest{Process: sel}))
	wantCode(t, err, connect.CodeFailedPrecondition, "Ctrl-D")
	in := &processpb.ProcessInput{Input: &processpb.ProcessInput_Pty{Pty: []byte("typed\n")}}
	if _, err := a.process.SendInput(ctx, connect.NewRequest(&processpb.SendInputRequest{Process: sel, Input: in})); err != nil {
		t.Fatal(err)
	}
	r := follow(t, stream)
	all := seen.String() + r.pty
	for _, want := range []string{"/dev/pts/", "40 100", "50 120", "xterm-256color typed"} {
		if !strings.Contains(all, want) {
			t.Errorf("%q is not in %q", want, all)
		}
	}
	if r.end.GetExitCode() != 0 {
		t.Errorf("end %v", r.end)
	}
}

func TestTerminalOutputIsWhole(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	for range 20 {
		msg := bash("seq 1 3000")
		msg.Pty = &processpb.PTY{}
		r := a.run(t, msg)
		if lines := strings.Count(r.pty, "\n"); lines != 3000 || !strings.HasSuffix(r.pty, "3000\r\n") {
			t.Fatalf("%d lines of 3000", lines)
		}
	}
}
