package envd

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	processpb "github.com/wrenn-sandbox/wrenn/internal/gen/process"
)

func TestStartGivesOutputAndExitCode(t *testing.T) {
	t.Parallel()
	r := newAgent(t).run(t, bash("echo out; echo err >&2; exit 7"))
	if r.err != nil || r.stdout != "out\n" || r.stderr != "err\n" || r.pid == 0 {
		t.Fatalf("got %+v", r)
	}
	if r.end.GetExitCode() != 7 || !r.end.GetExited() || r.end.GetStatus() != "exit status 7" {
		t.Fatalf("end %v", r.end)
	}
}

func TestStartRefusesWithClearErrors(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	file := filepath.Join(a.home, "plain")
	writeFile(t, file, "x")
	cfg := func(cmd, cwd string) *processpb.StartRequest {
		return &processpb.StartRequest{Process: &processpb.ProcessConfig{Cmd: cmd, Cwd: &cwd}}
	}
	for _, c := range []struct {
		name string
		msg  *processpb.StartRequest
		code connect.Code
		text string
	}{
		{"no command", cfg("", ""), connect.CodeInvalidArgument, "process.cmd is empty"},
		{"missing program", cfg("no-such-program", ""), connect.CodeNotFound, "command 'no-such-program' was not found in PATH"},
		{"missing path", cfg("/no/such/program", ""), connect.CodeNotFound, "'/no/such/program' does not exist"},
		{"not executable", cfg(file, ""), connect.CodePermissionDenied, "is not executable"},
		{"directory", cfg("/bin/", ""), connect.CodeInvalidArgument, "is a directory"},
		{"missing cwd", cfg("/bin/true", "/no/such/dir"), connect.CodeInvalidArgument, "cwd '/no/such/dir' does not exist"},
		{"cwd is a file", cfg("/bin/true", file), connect.CodeInvalidArgument, "is not a directory"},
		{"NUL", cfg("/bin/true\x00x", ""), connect.CodeInvalidArgument, "NUL"},
		{"env name", &processpb.StartRequest{Process: &processpb.ProcessConfig{Cmd: "true", Envs: map[string]string{"A=B": "c"}}}, connect.CodeInvalidArgument, "environment variable"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			wantCode(t, a.run(t, c.msg).err, c.code, c.text)
		})
	}
}

func TestStartOfAScriptWithoutInterpreter(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	file := filepath.Join(a.home, "script")
	writeFile(t, file, "#!/no/such/interpreter\n")
	if err := os.Chmod(file, 0o755); err != nil {
		t.Fatal(err)
	}
	r := a.run(t, &processpb.StartRequest{Process: &processpb.ProcessConfig{Cmd: file}})
	wantCode(t, r.err, connect.CodeNotFound, "cannot be started")
}

func TestEnvironmentAndDirectory(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	if err := a.store.Update(func(v *settingsValues) { v.Env = map[string]string{"FROM_INIT": "1", "BOTH": "init"} }); err != nil {
		t.Fatal(err)
	}
	msg := bash(`echo "$FROM_INIT $BOTH $USER $HOME $PWD"`)
	msg.Process.Envs = map[string]string{"BOTH": "request"}
	if r, want := a.run(t, msg), fmt.Sprintf("1 request user %s %s\n", a.home, a.home); r.stdout != want {
		t.Fatalf("got %q, want %q (%v)", r.stdout, want, r.err)
	}
	cwd := "/"
	msg = bash("pwd")
	msg.Process.Cwd = &cwd
	if r := a.run(t, msg); r.stdout != "/\n" {
		t.Fatalf("got %q", r.stdout)
	}
}

// A process that prints a lot and ends at once, read slowly: nothing is lost or out of order.
func TestOutputIsWholeForASlowReader(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	stream, _ := a.begin(t, cancelContext(t), bash("seq 1 400000"))
	got := sha256.New()
	for n := 0; stream.Receive(); n++ {
		data := stream.Msg().GetEvent().GetData().GetStdout()
		got.Write(data)
		if n%64 == 0 {
			time.Sleep(time.Millisecond) // being slow is what is tested
		}
	}
	want := sha256.New()
	for i := 1; i <= 400000; i++ {
		fmt.Fprintln(want, i)
	}
	if stream.Err() != nil || string(got.Sum(nil)) != string(want.Sum(nil)) {
		t.Fatalf("output differs (%v)", stream.Err())
	}
}

// A reader that does not read holds the process up; when it goes away the process goes on.
func TestBackPressureEndsWithTheReader(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	done := filepath.Join(a.home, "done")
	ctx, cancel := context.WithCancel(cancelContext(t))
	_, sel := a.begin(t, ctx, bash("head -c 200M /dev/zero; touch "+done))
	// The pipe, our queue and the sockets fill; then the writer must be found asleep on its pipe, each time.
	eventually(t, "the writer waits for its reader", func() bool {
		out, err := exec.Command("pgrep", "-s", strconv.Itoa(int(sel.GetPid())), "-x", "head").Output()
		if err != nil {
			return false
		}
		wchan, err := os.ReadFile("/proc/" + strings.TrimSpace(string(out)) + "/syscall")
		return err == nil && strings.HasPrefix(string(wchan), strconv.Itoa(unix.SYS_WRITE)+" ")
	})
	if _, err := os.Stat(done); err == nil {
		t.Fatal("200 MB went somewhere though nobody read them")
	}
	cancel()
	eventually(t, "the process ends without a reader", func() bool { _, err := os.Stat(done); return err == nil })
}

func TestEndDoesNotWaitForABackgroundChild(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	begun := time.Now()
	r := a.run(t, bash("sleep 300 & echo $!"))
	pid, err := strconv.Atoi(strings.TrimSpace(r.stdout))
	if err != nil || r.end == nil || r.end.GetExitCode() != 0 {
		t.Fatalf("got %+v", r)
	}
	defer func() { _ = unix.Kill(pid, unix.SIGKILL) }()
	if took := time.Since(begun); took > 10*time.Second {
		t.Errorf("end came after %s", took)
	}
	if unix.Kill(pid, 0) != nil {
		t.Error("the background child was killed")
	}
}

// Everything a process wrote comes before end though a child that prints for ever holds its pipe.
func TestOutputBeforeEndIsWholeBesideANoisyChild(t *testing.T) {
	t.Parallel()
	r := newAgent(t).run(t, bash(`(trap '' PIPE; while echo noise 2>/dev/null; do :; done) & p=$!; echo first; (sleep 1; kill -9 $p) >/dev/null 2>&1 & head -c 60000 /dev/zero | tr '\0' x; echo last`))
	if r.end.GetExitCode() != 0 || !strings.Contains(r.stdout, "last\n") || strings.Count(r.stdout, "x") != 60000 {
		t.Fatalf("end %v, %d bytes, %d of 60000 x", r.end, len(r.stdout), strings.Count(r.stdout, "x"))
	}
}

func TestTimeLimitKillsEverything(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	// Sent by hand: the client's own deadline would end its reading at the same moment.
	r := follow(t, a.start(t, cancelContext(t), bash("sleep 300 & echo $!; trap '' TERM; sleep 300"), "Connect-Timeout-Ms", "700"))
	pid, err := strconv.Atoi(strings.TrimSpace(r.stdout))
	if err != nil {
		t.Fatalf("got %+v", r)
	}
	wantCode(t, r.err, connect.CodeDeadlineExceeded, "time limit")
	if r.end == nil || r.end.GetExited() || r.end.GetExitCode() != -1 || !strings.Contains(r.end.GetError(), "time limit") {
		t.Errorf("end %v", r.end)
	}
	eventually(t, "the background child is dead", func() bool { return gone(pid) })
}

// The limit is the process's, also when its client went away.
func TestTimeLimitOutlivesTheClient(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	stream, sel := a.begin(t, ctx, bash("sleep 300"))
	stream.Close()
	cancel()
	eventually(t, "the process is dead", func() bool { return gone(int(sel.GetPid())) })
}

// gone tells whether a process ended; a zombie has.
func gone(pid int) bool {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err != nil || strings.Contains(string(raw), ") Z ")
}

func TestStdin(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	ctx := cancelContext(t)
	stream, sel := a.begin(t, ctx, bash("cat; echo bye"))
	for _, s := range []string{"one ", "two "} {
		if _, err := a.process.SendInput(ctx, connect.NewRequest(&processpb.SendInputRequest{Process: sel, Input: stdin(s)})); err != nil {
			t.Fatal(err)
		}
	}
	in := a.process.StreamInput(ctx)
	for _, m := range []*processpb.StreamInputRequest{
		{Event: &processpb.StreamInputRequest_Start{Start: &processpb.StreamInputRequest_StartEvent{Process: sel}}},
		{Event: &processpb.StreamInputRequest_Keepalive{Keepalive: &processpb.StreamInputRequest_KeepAlive{}}},
		{Event: &processpb.StreamInputRequest_Data{Data: &processpb.StreamInputRequest_DataEvent{Input: stdin("three ")}}},
		{Event: &processpb.StreamInputRequest_Data{Data: &processpb.StreamInputRequest_DataEvent{Input: stdin("four\n")}}},
	} {
		if err := in.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := in.CloseAndReceive(); err != nil {
		t.Fatal(err)
	}
	if _, err := a.process.CloseStdin(ctx, connect.NewRequest(&processpb.CloseStdinRequest{Process: sel})); err != nil {
		t.Fatal(err)
	}
	r := follow(t, stream)
	if r.stdout != "one two three four\nbye\n" || r.err != nil {
		t.Fatalf("got %+v", r)
	}
}

func stdin(s string) *processpb.ProcessInput {
	return &processpb.ProcessInput{Input: &processpb.ProcessInput_Stdin{Stdin: []byte(s)}}
}

func TestStdinRefusals(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	ctx := cancelContext(t)
	off := false
	msg := bash("sleep 300")
	msg.Stdin = &off
	stream, sel := a.begin(t, ctx, msg)
	defer stream.Close()
	send := func(sel *processpb.ProcessSelector, in *processpb.ProcessInput) error {
		_, err := a.process.SendInput(ctx, connect.NewRequest(&processpb.SendInputRequest{Process: sel, Input: in}))
		return err
	}
	wantCode(t, send(sel, stdin("x")), connect.CodeFailedPrecondition, "without a standard input")
	wantCode(t, send(sel, &processpb.ProcessInput{Input: &processpb.ProcessInput_Pty{Pty: []byte("x")}}), connect.CodeFailedPrecondition, "no terminal")
	wantCode(t, send(sel, nil), connect.CodeInvalidArgument, "neither")
	nobody := &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Pid{Pid: 1}}
	wantCode(t, send(nobody, stdin("x")), connect.CodeNotFound, "pid 1 not found")
	wantCode(t, send(nil, stdin("x")), connect.CodeInvalidArgument, "neither a pid nor a tag")
	a.signal(t, sel, 9)
}

// A process that does not read its input holds up SendInput only as long as the caller allows.
func TestSendInputStopsWithItsDeadline(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	stream, sel := a.begin(t, cancelContext(t), bash("sleep 300"))
	defer stream.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	_, err := a.process.SendInput(ctx, connect.NewRequest(&processpb.SendInputRequest{Process: sel, Input: stdin(strings.Repeat("x", 1<<20))}))
	wantCode(t, err, connect.CodeDeadlineExceeded, "")
	a.signal(t, sel, 9)
}

// The same for a terminal whose program does not read.
// A child that ignores the hang-up of its terminal does not hold up the end.
func (a *agent) signal(t testing.TB, sel *processpb.ProcessSelector, sig processpb.Signal) {
	t.Helper()
	if _, err := a.process.SendSignal(testContext(t), connect.NewRequest(&processpb.SendSignalRequest{Process: sel, Signal: sig})); err != nil {
		t.Fatal(err)
	}
}

func TestSignals(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	stream, sel := a.begin(t, cancelContext(t), bash("trap 'echo usr1' USR1; trap 'echo term; exit 3' TERM; echo ready; while :; do read -t 0.05 x; done"))
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	a.signal(t, sel, processpb.Signal(unix.SIGUSR1))
	if !stream.Receive() || string(stream.Msg().GetEvent().GetData().GetStdout()) != "usr1\n" {
		t.Fatalf("got %v", stream.Msg())
	}
	a.signal(t, sel, processpb.Signal_SIGNAL_SIGTERM)
	if r := follow(t, stream); r.stdout != "term\n" || r.end.GetExitCode() != 3 {
		t.Fatalf("got %+v", r)
	}
	_, err := a.process.SendSignal(testContext(t), connect.NewRequest(&processpb.SendSignalRequest{Process: sel, Signal: 9}))
	wantCode(t, err, connect.CodeNotFound, "not found")
	_, err = a.process.SendSignal(testContext(t), connect.NewRequest(&processpb.SendSignalRequest{Process: sel, Signal: 65}))
	wantCode(t, err, connect.CodeInvalidArgument, "signal 65")
}

func TestKillEndsChildrenToo(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	stream, sel := a.begin(t, cancelContext(t), bash("sleep 300 & echo $!; wait"))
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(stream.Msg().GetEvent().GetData().GetStdout())))
	if err != nil {
		t.Fatal(err)
	}
	a.signal(t, sel, processpb.Signal_SIGNAL_SIGKILL)
	if r := follow(t, stream); r.end.GetStatus() != "signal: killed" || r.end.GetExited() {
		t.Fatalf("end %v", r.end)
	}
	eventually(t, "the child is dead", func() bool { return gone(child) })
}

func TestListAndConnectByTag(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	ctx := cancelContext(t)
	tag := "job"
	msg := bash("read x; echo $x; read y; echo $y")
	msg.Tag = &tag
	first, sel := a.begin(t, ctx, msg)
	list, err := a.process.List(ctx, connect.NewRequest(&processpb.ListRequest{}))
	if err != nil || len(list.Msg.GetProcesses()) != 1 || list.Msg.GetProcesses()[0].GetTag() != tag || list.Msg.GetProcesses()[0].GetConfig().GetCmd() != "/bin/bash" {
		t.Fatalf("list %v %v", list, err)
	}
	byTag := &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Tag{Tag: tag}}
	second, err := a.process.Connect(ctx, connect.NewRequest(&processpb.ConnectRequest{Process: byTag}))
	if err != nil || !second.Receive() || second.Msg().GetEvent().GetStart().GetPid() != sel.GetPid() {
		t.Fatalf("connect: %v", err)
	}
	if _, err := a.process.SendInput(ctx, connect.NewRequest(&processpb.SendInputRequest{Process: byTag, Input: stdin("hello\nworld\n")})); err != nil {
		t.Fatal(err)
	}
	one, two := follow(t, first), follow(t, second)
	if one.stdout != "hello\nworld\n" || two.stdout != one.stdout || two.end.GetExitCode() != 0 {
		t.Fatalf("readers saw %q and %q", one.stdout, two.stdout)
	}
	list, err = a.process.List(ctx, connect.NewRequest(&processpb.ListRequest{}))
	if err != nil || len(list.Msg.GetProcesses()) != 0 {
		t.Fatalf("list after the end %v %v", list, err)
	}
	gone, err := a.process.Connect(ctx, connect.NewRequest(&processpb.ConnectRequest{Process: byTag}))
	if err != nil {
		t.Fatal(err)
	}
	wantCode(t, follow(t, gone).err, connect.CodeNotFound, `tag "job"`)
}

// Everything a short command prints on its terminal arrives, however fast it ends.
func TestKeepalive(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	ctx := cancelContext(t)
	stream := a.start(t, ctx, bash("read x"), "Keepalive-Ping-Interval", "1")
	var sel *processpb.ProcessSelector
	for stream.Receive() {
		if pid := stream.Msg().GetEvent().GetStart().GetPid(); pid != 0 {
			sel = &processpb.ProcessSelector{Selector: &processpb.ProcessSelector_Pid{Pid: pid}}
		}
		if stream.Msg().GetEvent().GetKeepalive() != nil {
			break
		}
	}
	if _, err := a.process.CloseStdin(ctx, connect.NewRequest(&processpb.CloseStdinRequest{Process: sel})); err != nil {
		t.Fatal(err)
	}
	if r := follow(t, stream); r.end.GetExitCode() != 1 {
		t.Fatalf("end %v", r.end)
	}
	wantCode(t, a.run(t, bash("true"), "Keepalive-Ping-Interval", "soon").err, connect.CodeInvalidArgument, "Keepalive-Ping-Interval")
}

func TestUsers(t *testing.T) {
	t.Parallel()
	a := newAgent(t)
	wantCode(t, a.run(t, bash("true"), "Authorization", basic("nobody-at-all")).err, connect.CodeUnauthenticated, `unknown user "nobody-at-all"`)
	wantCode(t, a.run(t, bash("true"), "Authorization", "Bearer x").err, connect.CodeUnauthenticated, "Authorization")
	if os.Geteuid() != 0 {
		wantCode(t, a.run(t, bash("true"), "Authorization", basic("other")).err, connect.CodePermissionDenied, "does not run as root")
		t.Skip("needs root: running as another user")
	}
	cwd := "/"
	msg := bash("id -u; id -g; id -G; echo $USER $HOME")
	msg.Process.Cwd = &cwd
	r := a.run(t, msg, "Authorization", basic("other"))
	if want := "65531\n65532\n65532 65529 65530\nother /tmp\n"; r.stdout != want {
		t.Fatalf("got %q, want %q (%v)", r.stdout, want, r.err)
	}
}
