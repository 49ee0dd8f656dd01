package localstack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// Defaults of Config.
const (
	DefaultPort      = 8000
	DefaultAgentPort = 50051
	DefaultEgress    = "internet"
)

// Config is what a stack remembers between runs.
type Config struct {
	Port      int    `json:"port"`       // of the REST API on 127.0.0.1
	AgentPort int    `json:"agent_port"` // of the agent's RPC on 127.0.0.1
	Egress    string `json:"egress"`     // AGENT_EGRESS
	// Bin holds wrenn-cp and wrenn-agent.
	Bin string `json:"bin"`
	// Kernel and Images are AGENT_KERNEL_PATH and AGENT_IMAGES_PATH.
	Kernel string `json:"kernel"`
	Images string `json:"images"`
	// VolumeSize is AGENT_VOLUME_SIZE; empty leaves it to the agent.
	VolumeSize string `json:"volume_size,omitempty"`
}

// Progress hears of the steps of Up, Down and Reset as they happen.
type Progress interface {
	// Step begins a step; the function it returns ends it with a word on the outcome, or an error.
	Step(name string) (done func(outcome string, err error))
}

// Stack is Wrenn on this machine. Its methods may be called by several processes at a time: a lock
// lets one work and the others wait.
type Stack struct {
	Home     string
	Progress Progress

	config Config
	root   *rootRunner
}

// Open reads what a former Up left in home; nothing is started. The fields of want that are not zero
// take the place of what was remembered.
func Open(home string, want Config, p Progress) (*Stack, error) {
	home, err := filepath.Abs(home)
	if err != nil {
		return nil, err
	}
	s := &Stack{Home: home, Progress: p, root: newRootRunner()}
	if raw, err := os.ReadFile(s.path("stack.json")); err == nil {
		if err := json.Unmarshal(raw, &s.config); err != nil {
			return nil, fmt.Errorf("%s is damaged: %w; `wrenn reset` begins anew", s.path("stack.json"), err)
		}
	}
	s.config = s.config.with(want, home)
	return s, nil
}

// with gives c with the non-zero fields of want, and defaults for what neither has.
func (c Config) with(want Config, home string) Config {
	pick := func(to *string, v, fallback string) {
		if v != "" {
			*to = v
		}
		if *to == "" {
			*to = fallback
		}
	}
	pickInt := func(to *int, v, fallback int) {
		if v != 0 {
			*to = v
		}
		if *to == 0 {
			*to = fallback
		}
	}
	pickInt(&c.Port, want.Port, DefaultPort)
	pickInt(&c.AgentPort, want.AgentPort, DefaultAgentPort)
	pick(&c.Egress, want.Egress, DefaultEgress)
	pick(&c.Bin, want.Bin, "")
	pick(&c.Kernel, want.Kernel, filepath.Join(home, "kernels", "vmlinuz"))
	pick(&c.Images, want.Images, filepath.Join(home, "images"))
	pick(&c.VolumeSize, want.VolumeSize, "")
	return c
}

// URL is where the REST API of the stack is.
func (s *Stack) URL() string { return fmt.Sprintf("http://127.0.0.1:%d", s.config.Port) }

// EnvFile is the file with what a user's shell needs.
func (s *Stack) EnvFile() string { return s.path("env") }

// Exists tells whether there is anything of a stack.
func (s *Stack) Exists() bool {
	_, err := os.Stat(s.path("stack.json"))
	return err == nil
}

func (s *Stack) path(elem ...string) string {
	return filepath.Join(append([]string{s.Home}, elem...)...)
}

// lock makes the home directory and keeps other callers out.
func (s *Stack) lock() (unlock func(), err error) {
	for _, dir := range []string{"", "logs", "run", "agent"} {
		if err := os.MkdirAll(s.path(dir), 0o755); err != nil {
			return nil, fmt.Errorf("making the stack's directory: %w", err)
		}
	}
	return lockFile(s.path("run", "lock"))
}

func (s *Stack) remember() error {
	raw, err := json.MarshalIndent(s.config, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(s.path("stack.json"), append(raw, '\n'), 0o644)
}

// step runs one step and tells Progress about it.
func (s *Stack) step(name string, run func() (outcome string, err error)) error {
	done := func(string, error) {}
	if s.Progress != nil {
		done = s.Progress.Step(name)
	}
	outcome, err := run()
	done(outcome, err)
	return err
}

// Up starts what does not run yet, in order, and returns when sandboxes can be created. It is meant
// to be repeated: what runs with the same program and settings is left alone, what has changed is
// started anew, what has crashed is started again. Running sandboxes are not touched.
func (s *Stack) Up(ctx context.Context) error {
	if err := s.checkFiles(); err != nil {
		return err
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if !s.Exists() { // so that Down finds a stack whose first Up failed half-way
		if err := s.remember(); err != nil {
			return err
		}
	}
	if err := s.root.ready(ctx); err != nil {
		return err
	}
	u := &bringUp{Stack: s}
	for _, step := range []struct {
		name string
		run  func(context.Context) (string, error)
	}{
		{"PostgreSQL", u.postgres},
		{"Redis", u.redis},
		{"control plane", u.controlPlane},
		{"admin and API key", u.account},
		{"host agent", u.agent},
		{"host online", u.hostOnline},
	} {
		if err := s.step(step.name, func() (string, error) { return step.run(ctx) }); err != nil {
			return err
		}
	}
	return s.remember() // only settings that work are worth remembering
}

// checkFiles looks for what Up cannot make itself.
func (s *Stack) checkFiles() error {
	for _, f := range []struct{ path, hint string }{
		{filepath.Join(s.config.Bin, "wrenn-cp"), "make build"},
		{filepath.Join(s.config.Bin, "wrenn-agent"), "make build"},
		{s.config.Kernel, "make images"},
		{s.config.Images, "make images"},
	} {
		if _, err := os.Stat(f.path); err != nil {
			return fmt.Errorf("%s is missing: run `%s` first", f.path, f.hint)
		}
	}
	return nil
}

// Down stops everything in order and keeps all data. Virtual machines are powered off cleanly.
func (s *Stack) Down(ctx context.Context) error {
	if !s.Exists() {
		return nil
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.root.ready(ctx); err != nil {
		return err
	}
	return s.down(ctx, true)
}

func (s *Stack) down(ctx context.Context, cleanly bool) error {
	var errs []error
	do := func(name string, run func(context.Context) (string, error)) {
		errs = append(errs, s.step(name, func() (string, error) { return run(ctx) }))
	}
	do("stop the host agent", func(ctx context.Context) (string, error) {
		return s.stopDaemon(ctx, "wrenn-agent")
	})
	if cleanly {
		do("stop sandboxes", s.stopVMs)
	}
	do("stop the control plane", func(ctx context.Context) (string, error) {
		return s.stopDaemon(ctx, "wrenn-cp")
	})
	do("stop Redis", func(ctx context.Context) (string, error) { return stopServer(ctx, s.path("redis")) })
	do("stop PostgreSQL", func(ctx context.Context) (string, error) { return stopServer(ctx, s.path("postgres")) })
	return errors.Join(errs...)
}

// stopVMs asks the agent's program to power the machines off: the agent itself leaves them running
// when it stops, so that it can be upgraded.
func (s *Stack) stopVMs(ctx context.Context) (string, error) {
	if !s.registered() {
		return "there are none", nil
	}
	out, err := s.root.run(ctx, s.agentEnv(), filepath.Join(s.config.Bin, "wrenn-agent"), "stop-vms")
	if err != nil {
		return "", fmt.Errorf("wrenn-agent stop-vms: %w\n%s", err, lastOf(out))
	}
	return "paused, disks and memory kept", nil
}

// Reset stops everything and removes it: sandboxes, accounts, databases, network, mounts. With
// keepImages the guest kernel and images below Home stay.
func (s *Stack) Reset(ctx context.Context, keepImages bool) error {
	if _, err := os.Stat(s.Home); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.root.ready(ctx); err != nil {
		return err
	}
	if err := s.down(ctx, false); err != nil {
		return err
	}
	if err := s.step("remove sandboxes", func() (string, error) { return s.resetAgent(ctx) }); err != nil {
		return err
	}
	return s.step("remove data", func() (string, error) { return s.Home, s.removeHome(ctx, keepImages) })
}

// resetAgent lets the agent remove what it made outside Home too: namespaces, tables, mounts.
func (s *Stack) resetAgent(ctx context.Context) (string, error) {
	if !exists(s.path("sandboxes")) && !s.registered() {
		return "there are none", nil
	}
	program := filepath.Join(s.config.Bin, "wrenn-agent")
	if !exists(program) {
		return "", fmt.Errorf("%s is missing, which is needed to remove what it made: run `make build` first", program)
	}
	out, err := s.root.run(ctx, s.agentEnv(), program, "reset", "--yes")
	if err != nil {
		return "", fmt.Errorf("wrenn-agent reset: %w\n%s", err, lastOf(out))
	}
	return "", nil
}

// removeHome removes what Up made, and nothing a user put beside it.
func (s *Stack) removeHome(ctx context.Context, keepImages bool) error {
	names := []string{"env", "secrets", "postgres", "redis", "agent", "sandboxes", "sandboxes.xfs", "sandboxes.kvm.json", "logs", "stack.json", "run"}
	if !keepImages {
		names = append(names, "images", "kernels")
	}
	paths := []string{"-rf", "--one-file-system", "--"}
	for _, name := range names {
		paths = append(paths, s.path(name))
	}
	if out, err := s.root.run(ctx, nil, "rm", paths...); err != nil {
		return fmt.Errorf("removing the data: %w\n%s", err, lastOf(out))
	}
	if err := os.Remove(s.Home); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) {
		return err
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
