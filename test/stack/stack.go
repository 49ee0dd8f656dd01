// Package stack runs the whole of Wrenn for tests and benchmarks: real PostgreSQL and Redis, wrenn-cp
// and wrenn-agent as processes of their own, sandboxes as real virtual machines, in a directory of its
// own, with egress off. It is for tests only, and must not reach into the programs: it speaks to them
// as users do.
package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/localstack"
	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

// Inputs are what a stack is made from; make test sets them.
type Inputs struct {
	Bin    string // WRENN_TEST_BIN: directory of the built programs
	Kernel string // WRENN_TEST_KERNEL: guest kernel, with initramfs.img beside it
	Images string // WRENN_TEST_IMAGES: directory of NAME.ext4
}

// FindInputs reads the environment, and falls back to what `make build images` makes. The error says
// what a test lacks, for t.Skip.
func FindInputs() (Inputs, error) {
	_, file, _, _ := runtime.Caller(0)
	root := filepath.Join(filepath.Dir(file), "..", "..")
	pick := func(name, fallback string) string {
		if v := os.Getenv(name); v != "" {
			return v
		}
		return filepath.Join(root, fallback)
	}
	in := Inputs{
		Bin:    pick("WRENN_TEST_BIN", "builds"),
		Kernel: pick("WRENN_TEST_KERNEL", ".wrenn/kernels/vmlinuz"),
		Images: pick("WRENN_TEST_IMAGES", ".wrenn/images"),
	}
	if os.Geteuid() != 0 {
		return in, errors.New("needs root: virtual machines get namespaces, mounts and cgroups")
	}
	for _, path := range []string{filepath.Join(in.Bin, "wrenn-agent"), in.Kernel, filepath.Join(in.Images, "minimal.ext4")} {
		if _, err := os.Stat(path); err != nil {
			return in, fmt.Errorf("needs %s: run `make build images`", path)
		}
	}
	return in, nil
}

// Stack is a running system.
type Stack struct {
	Inputs
	Dir           string
	URL           string
	Client        *wrenn.Client // with the team's API key
	Admin         *wrenn.Client // with the admin's token
	Key           string
	HostID        string
	Postgres      *localstack.Server
	Redis         *localstack.Server
	ControlPlane  *Process
	Agent         *Process
	cpPort        int
	agentPort     int
	agentInstance string
	baseUID       int
	planeEnv      []string
}

// uidRange is how many uids a stack's virtual machines may use.
const uidRange = 4000

// Email and Password of the admin.
const (
	Email    = "admin@example.com"
	Password = "correct horse battery staple"
)

// Start brings everything up below dir and returns when a host is online. planeEnv is added to the
// environment of wrenn-cp.
func Start(ctx context.Context, in Inputs, dir string, planeEnv ...string) (s *Stack, err error) {
	s = &Stack{Inputs: in, Dir: dir, planeEnv: planeEnv}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := os.Chmod(dir, 0o755); err != nil { // the database servers' user must get through
		return s, err
	}
	if s.Postgres, err = localstack.StartPostgres(ctx, localstack.Options{Dir: filepath.Join(dir, "postgres"), Ephemeral: true}); err != nil {
		return s, err
	}
	if s.Redis, err = localstack.StartRedis(ctx, localstack.Options{Dir: filepath.Join(dir, "redis"), Ephemeral: true}); err != nil {
		return s, err
	}
	if s.cpPort, err = freePort(); err != nil {
		return s, err
	}
	if s.agentPort, err = freePort(); err != nil {
		return s, err
	}
	s.URL = "http://127.0.0.1:" + strconv.Itoa(s.cpPort)
	s.baseUID = 100_000_000 + int(time.Now().UnixNano()%100_000)*uidRange // apart from stacks of other tests
	s.agentInstance = "t" + strconv.FormatInt(time.Now().UnixNano()%(36*36*36*36*36), 36)
	if err := s.StartControlPlane(ctx); err != nil {
		return s, err
	}
	if err := s.enrol(ctx); err != nil {
		return s, err
	}
	return s, s.WaitOnline(ctx)
}

// enrol makes the admin, an API key and a host, and starts the agent with the host's token.
func (s *Stack) enrol(ctx context.Context) error {
	admin := exec.CommandContext(ctx, filepath.Join(s.Bin, "wrenn-cp"), "admin", "create", "--email", Email, "--password-stdin")
	admin.Env = s.controlPlaneEnv()
	admin.Stdin = strings.NewReader(Password + "\n")
	if out, err := admin.CombinedOutput(); err != nil {
		return fmt.Errorf("wrenn-cp admin create: %w: %s", err, out)
	}
	var err error
	if s.Admin, err = wrenn.New(wrenn.WithURL(s.URL)); err != nil {
		return err
	}
	if _, err := s.Admin.Login(ctx, Email, Password); err != nil {
		return err
	}
	key, err := s.Admin.CreateKey(ctx, "tests")
	if err != nil {
		return err
	}
	s.Key = key.Key
	if s.Client, err = wrenn.New(wrenn.WithURL(s.URL), wrenn.WithAPIKey(s.Key)); err != nil {
		return err
	}
	host, err := s.Admin.CreateHost(ctx, api.CreateHostRequest{Type: api.HostTypeRegular})
	if err != nil {
		return err
	}
	s.HostID = host.Host.ID
	return s.StartAgent(ctx, "--register", host.RegistrationToken)
}

// StartControlPlane starts wrenn-cp and waits until it is ready.
func (s *Stack) StartControlPlane(ctx context.Context) (err error) {
	if s.ControlPlane, err = start(s.Dir, filepath.Join(s.Bin, "wrenn-cp"), nil, s.controlPlaneEnv()); err != nil {
		return err
	}
	return poll(ctx, s.ControlPlane, func() error { return get(ctx, s.URL+"/readyz") })
}

// StartAgent starts wrenn-agent.
func (s *Stack) StartAgent(_ context.Context, args ...string) (err error) {
	args = append(args, "--address", "127.0.0.1:"+strconv.Itoa(s.agentPort))
	s.Agent, err = start(s.Dir, filepath.Join(s.Bin, "wrenn-agent"), args, s.AgentEnv())
	return err
}

// WaitOnline waits until the control plane hears the host and knows what it can run.
func (s *Stack) WaitOnline(ctx context.Context) error {
	return poll(ctx, s.Agent, func() error {
		host, err := s.Admin.Host(ctx, s.HostID)
		if err != nil {
			return err
		}
		if host.Status != api.HostStatusOnline {
			return fmt.Errorf("host is %s", host.Status)
		}
		templates, err := s.Client.Templates(ctx) // known from the first heartbeat on
		if err == nil && len(templates) == 0 {
			err = errors.New("the host has reported no template")
		}
		return err
	})
}

// Close ends and removes everything.
func (s *Stack) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var errs []error
	if s.Agent != nil {
		errs = append(errs, s.Agent.Kill())
		reset := exec.CommandContext(ctx, filepath.Join(s.Bin, "wrenn-agent"), "reset", "--yes")
		reset.Env = s.AgentEnv()
		if out, err := reset.CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("wrenn-agent reset: %w: %s", err, out))
		}
	}
	if s.ControlPlane != nil {
		errs = append(errs, s.ControlPlane.Kill())
	}
	for _, server := range []*localstack.Server{s.Postgres, s.Redis} {
		if server != nil {
			errs = append(errs, server.Stop(ctx))
		}
	}
	return errors.Join(errs...)
}

func (s *Stack) controlPlaneEnv() []string {
	return append(append(os.Environ(), s.planeEnv...),
		"CP_LISTEN_ADDR=127.0.0.1:"+strconv.Itoa(s.cpPort),
		"DATABASE_URL="+s.Postgres.URL, "REDIS_URL="+s.Redis.URL,
		"JWT_SECRET="+strings.Repeat("test-secret.", 4),
		"WRENN_ENCRYPTION_KEY="+strings.Repeat("0123456789abcdef", 4),
		"CP_CPU_OVERCOMMIT=64", // memory is the limit: a test machine has few cores
	)
}

// AgentEnv is the agent's environment, also for doctor, reset and stop-vms.
func (s *Stack) AgentEnv() []string {
	return append(os.Environ(),
		"AGENT_CP_URL="+s.URL, "AGENT_LISTEN_ADDR=127.0.0.1:"+strconv.Itoa(s.agentPort),
		"AGENT_TOKEN_FILE="+filepath.Join(s.Dir, "agent", "token"), "AGENT_KERNEL_PATH="+s.Kernel,
		"AGENT_IMAGES_PATH="+s.Images, "AGENT_SANDBOXES_PATH="+filepath.Join(s.Dir, "sandboxes"),
		"AGENT_VOLUME_SIZE=160G", "AGENT_EGRESS=none", "AGENT_INSTANCE="+s.agentInstance, "AGENT_HEARTBEAT_SEC=2",
		"AGENT_BASE_UID="+strconv.Itoa(s.baseUID),
	)
}

// Process is a program that the stack started.
type Process struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

// start runs a program with its output in dir/NAME.log.
func start(dir, path string, args, env []string) (*Process, error) {
	log, err := os.OpenFile(filepath.Join(dir, filepath.Base(path)+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	// Not bound to a context: the stack ends its processes by itself, in order.
	p := &Process{cmd: exec.CommandContext(context.Background(), path, args...), ended: make(chan struct{})}
	p.cmd.Env = env
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = p.cmd.Wait() // how it ended shows in its log
		close(p.ended)
	}()
	return p, nil
}

// PID of the process.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Ended is closed when the process has ended.
func (p *Process) Ended() <-chan struct{} { return p.ended }

// Kill ends the process as `kill -9` does and returns when it is gone.
func (p *Process) Kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-p.ended
	return nil
}

// Terminate asks the process to end and returns when it is gone.
func (p *Process) Terminate() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-p.ended
	return nil
}

// Logs are the last lines that the programs wrote, for a test that failed.
func (s *Stack) Logs() string {
	var b strings.Builder
	for _, name := range []string{"wrenn-cp", "wrenn-agent"} {
		raw, err := os.ReadFile(filepath.Join(s.Dir, name+".log"))
		if err != nil {
			continue
		}
		if len(raw) > 8<<10 {
			raw = raw[len(raw)-8<<10:]
		}
		fmt.Fprintf(&b, "== %s ==\n%s\n", name, raw)
	}
	return b.String()
}

// poll asks until check succeeds, the process ends or ctx does.
func poll(ctx context.Context, p *Process, check func() error) error {
	err := ask(ctx, p.ended, check)
	if err == nil {
		return nil
	}
	select {
	case <-p.ended:
		return fmt.Errorf("%s ended: %w", filepath.Base(p.cmd.Path), err)
	default:
		return errors.Join(ctx.Err(), err)
	}
}

func get(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, res.Status)
	}
	return nil
}

func freePort() (int, error) {
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
