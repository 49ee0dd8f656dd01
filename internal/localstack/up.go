package localstack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"time"

	wrennsdk "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

// How long the parts may take to be ready. The agent boots a test machine at its first start, to
// find out whether KVM works with the guest kernel.
const (
	controlPlaneLimit = 60 * time.Second
	agentLimit        = 5 * time.Minute
)

// bringUp is one run of Up: each step leaves here what the next ones need.
type bringUp struct {
	*Stack
	databaseURL, redisURL string
	secrets               settings
	env                   settings
	client                *wrennsdk.Client
	hostID                string
	agentProcess          process
}

func (u *bringUp) postgres(ctx context.Context) (string, error) {
	srv, err := StartPostgres(ctx, Options{Dir: u.path("postgres"), LogFile: u.logFile("postgres")})
	if err != nil {
		return "", err
	}
	u.databaseURL = srv.URL
	return outcome(srv.Reused, srv.PID), nil
}

func (u *bringUp) redis(ctx context.Context) (string, error) {
	srv, err := StartRedis(ctx, Options{Dir: u.path("redis"), LogFile: u.logFile("redis")})
	if err != nil {
		return "", err
	}
	u.redisURL = srv.URL
	return outcome(srv.Reused, srv.PID), nil
}

func outcome(reused bool, pid int) string {
	if reused {
		return fmt.Sprintf("already running, pid %d", pid)
	}
	return fmt.Sprintf("started, pid %d", pid)
}

// controlPlane starts wrenn-cp and waits until it is ready to serve.
func (u *bringUp) controlPlane(ctx context.Context) (string, error) {
	var err error
	if u.secrets, err = u.loadSecrets(); err != nil {
		return "", err
	}
	if u.client, err = wrennsdk.New(wrennsdk.WithURL(u.URL()), wrennsdk.WithAPIKey(""), wrennsdk.WithUserAgent("wrenn up")); err != nil {
		return "", err
	}
	program, env := filepath.Join(u.config.Bin, "wrenn-cp"), u.controlPlaneEnv()
	print, err := fingerprint(program, env...)
	if err != nil {
		return "", err
	}
	p, alive := u.running("wrenn-cp")
	reused := alive && u.upToDate("wrenn-cp", print)
	if alive && p.Port != 0 && p.Port != u.config.Port { // looked at first, so that what runs is not stopped in vain
		if err := u.portForControlPlane(ctx); err != nil {
			return "", err
		}
	}
	if alive && !reused {
		if _, err := u.stopDaemon(ctx, "wrenn-cp"); err != nil {
			return "", err
		}
	}
	if !reused {
		if p, err = u.startControlPlane(ctx, program, env, print); err != nil {
			return "", err
		}
	}
	if err := u.awaitReady(ctx, p); err != nil {
		return "", u.failed("wrenn-cp", err)
	}
	return outcome(reused, p.PID) + ", " + u.URL(), nil
}

func (u *bringUp) startControlPlane(ctx context.Context, program string, env []string, print string) (process, error) {
	if err := u.portForControlPlane(ctx); err != nil {
		return process{}, err
	}
	who, err := unprivileged()
	if err != nil {
		return process{}, err
	}
	d := daemon{Path: program, Env: env, Dir: "/", Log: u.logFile("wrenn-cp"), As: who, ByFD: who != nil}
	p, _, err := d.start()
	if err != nil {
		return process{}, err
	}
	p.Port = u.config.Port
	return p, u.record("wrenn-cp", p, print)
}

func (u *bringUp) portForControlPlane(ctx context.Context) error {
	if err := portFree(ctx, u.config.Port); err != nil {
		return fmt.Errorf("%w; choose another one: WRENN_PORT=8010 wrenn up", err)
	}
	return nil
}

func (u *bringUp) controlPlaneEnv() []string {
	env := settings{
		"PATH": rootPath, "HOME": "/", "TZ": "UTC",
		"CP_LISTEN_ADDR": fmt.Sprintf("127.0.0.1:%d", u.config.Port),
		"DATABASE_URL":   u.databaseURL, "REDIS_URL": u.redisURL,
	}
	for k, v := range u.secrets {
		env[k] = v
	}
	return env.list()
}

// awaitReady asks /readyz until all is well.
func (u *bringUp) awaitReady(ctx context.Context, p process) error {
	ctx, cancel := context.WithTimeout(ctx, controlPlaneLimit)
	defer cancel()
	var last error
	err := poll(ctx, 50*time.Millisecond, func() (bool, error) {
		if _, last = u.client.Ready(ctx); last == nil {
			return true, nil
		}
		if !p.alive() {
			return false, errors.New("it ended")
		}
		return false, nil
	})
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("it is not ready: %w", last)
	}
	return err
}

// account makes sure of the admin and of an API key, and writes the file for the user's shell.
func (u *bringUp) account(ctx context.Context) (string, error) {
	var err error
	if u.env, err = u.loadEnv(); err != nil {
		return "", err
	}
	u.env["WRENN_API_URL"], u.env["DATABASE_URL"], u.env["REDIS_URL"] = u.URL(), u.databaseURL, u.redisURL
	if err := u.login(ctx); err != nil {
		return "", err
	}
	word := "key is valid"
	if !u.keyWorks(ctx) {
		key, err := u.client.CreateKey(ctx, "wrenn up")
		if err != nil {
			return "", fmt.Errorf("making an API key: %w", err)
		}
		u.env["WRENN_API_KEY"] = key.Key
		word = "key made"
	}
	return word + ", " + u.EnvFile(), u.saveEnv(u.env)
}

// login logs the admin in, making the account first if it is not there or its password was lost.
func (u *bringUp) login(ctx context.Context) error {
	if u.env["WRENN_ADMIN_PASSWORD"] != "" {
		_, err := u.client.Login(ctx, u.env["WRENN_ADMIN_EMAIL"], u.env["WRENN_ADMIN_PASSWORD"])
		if wrennsdk.CodeOf(err) != wrennsdk.CodeUnauthorized {
			return err
		}
	}
	u.env["WRENN_ADMIN_EMAIL"], u.env["WRENN_ADMIN_PASSWORD"] = adminEmail, randomHex(12)
	if err := u.saveEnv(u.env); err != nil { // before the account: a password must not be lost
		return err
	}
	if err := u.createAdmin(ctx); err != nil {
		return err
	}
	_, err := u.client.Login(ctx, u.env["WRENN_ADMIN_EMAIL"], u.env["WRENN_ADMIN_PASSWORD"])
	return err
}

const adminEmail = "admin@wrenn.local"

func (u *bringUp) keyWorks(ctx context.Context) bool {
	if u.env["WRENN_API_KEY"] == "" {
		return false
	}
	c, err := wrennsdk.New(wrennsdk.WithURL(u.URL()), wrennsdk.WithAPIKey(u.env["WRENN_API_KEY"]))
	if err != nil {
		return false
	}
	_, err = c.Templates(ctx)
	return err == nil
}

// agent registers this machine as a host, if it is not, and starts the agent.
func (u *bringUp) agent(ctx context.Context) (string, error) {
	program, env := filepath.Join(u.config.Bin, "wrenn-agent"), u.agentEnv()
	print, err := fingerprint(program, env.list()...)
	if err != nil {
		return "", err
	}
	args, note, err := u.registration(ctx)
	if err != nil {
		return "", err
	}
	p, alive := u.running("wrenn-agent")
	if alive && len(args) == 0 && u.upToDate("wrenn-agent", print) {
		u.agentProcess = p
		return outcome(true, p.PID), nil
	}
	if alive {
		if _, err := u.stopDaemon(ctx, "wrenn-agent"); err != nil {
			return "", err
		}
	}
	if err := portFree(ctx, u.config.AgentPort); err != nil {
		return "", fmt.Errorf("%w; choose another one: WRENN_AGENT_PORT=50061 wrenn up", err)
	}
	p, err = u.startRoot(ctx, "wrenn-agent", env, program, args...)
	if err != nil {
		return "", err
	}
	u.agentProcess = p
	return outcome(false, p.PID) + note, u.record("wrenn-agent", p, print)
}

func (s *Stack) agentAddress() string { return fmt.Sprintf("127.0.0.1:%d", s.config.AgentPort) }

func (s *Stack) agentEnv() settings {
	env := settings{
		"AGENT_CP_URL": s.URL(), "AGENT_LISTEN_ADDR": s.agentAddress(), "AGENT_TOKEN_FILE": s.tokenFile(),
		"AGENT_KERNEL_PATH": s.config.Kernel, "AGENT_IMAGES_PATH": s.config.Images,
		"AGENT_SANDBOXES_PATH": s.path("sandboxes"), "AGENT_EGRESS": s.config.Egress,
	}
	if s.config.VolumeSize != "" {
		env["AGENT_VOLUME_SIZE"] = s.config.VolumeSize
	}
	return env
}

func (s *Stack) tokenFile() string { return s.path("agent", "host-token") }

// registered tells whether this machine has the token of a host.
func (s *Stack) registered() bool { return exists(s.tokenFile()) }

// registration gives the flags with which the agent registers, none if it has already. The host's id
// is kept, so that a registration that failed is tried again with the same record.
func (u *bringUp) registration(ctx context.Context) (flags []string, note string, err error) {
	idFile := u.path("run", "host-id")
	raw, _ := os.ReadFile(idFile)
	u.hostID = string(raw)
	known := false
	if u.hostID != "" {
		host, err := u.client.Host(ctx, u.hostID)
		if err != nil && !wrennsdk.IsNotFound(err) {
			return nil, "", err
		}
		known = err == nil
		if known && u.registered() && host.Address != u.agentAddress() {
			return nil, "", fmt.Errorf("this host is registered at %s, so its agent cannot move to %s; leave WRENN_AGENT_PORT out, or `wrenn reset`",
				host.Address, u.agentAddress())
		}
	}
	if known && u.registered() {
		return nil, "", nil
	}
	var made *api.HostWithToken
	if known {
		made, err = u.client.NewHostToken(ctx, u.hostID)
	}
	if !known || wrennsdk.CodeOf(err) == wrennsdk.CodeInvalidState {
		// The host is gone, or was registered and its token is lost: it becomes a new one.
		made, err = u.client.CreateHost(ctx, api.CreateHostRequest{Type: api.HostTypeRegular, Provider: "wrenn up"})
	}
	if err != nil {
		return nil, "", fmt.Errorf("making the host's registration token: %w", err)
	}
	if err := u.forgetToken(ctx); err != nil {
		return nil, "", err
	}
	u.hostID = made.Host.ID
	if err := writeFile(idFile, []byte(u.hostID), 0o644); err != nil {
		return nil, "", err
	}
	return []string{"--register", made.RegistrationToken, "--address", u.agentAddress()}, ", registers as " + u.hostID, nil
}

// forgetToken removes the identity of a host that no longer is one.
func (u *bringUp) forgetToken(ctx context.Context) error {
	if !u.registered() {
		return nil
	}
	f := u.tokenFile()
	_, err := u.root.run(ctx, nil, "rm", "-f", "--", f, f+".key", f+".crt", f+".ca")
	return err
}

// hostOnline waits until the control plane would place sandboxes on the host.
func (u *bringUp) hostOnline(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, agentLimit)
	defer cancel()
	var host *api.Host
	err := poll(ctx, 100*time.Millisecond, func() (bool, error) {
		if !u.agentProcess.alive() {
			return false, errors.New("it ended")
		}
		h, err := u.client.Host(ctx, u.hostID)
		if err != nil {
			return false, err
		}
		host = h
		return h.Status == api.HostStatusOnline && h.MtlsEnabled && h.Address == u.agentAddress() && len(h.Versions) > 0 && u.answers(ctx), nil
	})
	if errors.Is(err, context.DeadlineExceeded) {
		err = errors.New("it did not report to the control plane in time")
	}
	if err != nil {
		return "", u.failed("wrenn-agent", err)
	}
	return describeHost(host), nil
}

// answers tells whether the agent's RPC port takes connections. A host stays "online" for a while
// after its agent has died, so its status alone does not show that a new agent is ready.
func (u *bringUp) answers(ctx context.Context) bool { return portFree(ctx, u.config.AgentPort) != nil }

func describeHost(h *api.Host) string {
	text := fmt.Sprintf("%d CPUs, %d MB", h.CPUCores, h.MemoryMB)
	if h.Driver != "" {
		text += ", " + h.Driver
	}
	if h.Acceleration != "" {
		text += " (" + h.Acceleration + ")"
	}
	return text
}

// list gives the settings in the form of an environment, in order.
func (s settings) list() []string {
	out := make([]string, 0, len(s))
	for k, v := range s {
		out = append(out, k+"="+v)
	}
	sort.Strings(out)
	return out
}
