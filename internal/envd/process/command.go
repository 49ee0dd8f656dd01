package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/envd/account"
	"github.com/wrenn-sandbox/wrenn/internal/envd/settings"
	processpb "github.com/wrenn-sandbox/wrenn/internal/gen/process"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Bounds of a command; execve has limits of its own (128 KiB for one string, a quarter of the stack for
// all) that it reports itself.
const (
	maxArgs = 16 << 10
	maxEnvs = 4 << 10
)

// command is a checked request: what execve will be told.
type command struct {
	path string
	argv []string
	env  []string
	dir  string
	user account.Account
}

func invalid(format string, args ...any) error {
	return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf(format, args...))
}

// resolve checks cfg and fills in what it leaves open from the user's account and the settings.
func resolve(cfg *processpb.ProcessConfig, user account.Account, set settings.Values, tty bool) (command, error) {
	switch {
	case cfg.GetCmd() == "":
		return command{}, invalid("process.cmd is empty; name the program to run")
	case len(cfg.GetArgs()) > maxArgs:
		return command{}, invalid("process.args has %d entries; at most %d are taken", len(cfg.GetArgs()), maxArgs)
	case len(cfg.GetEnvs()) > maxEnvs:
		return command{}, invalid("process.envs has %d entries; at most %d are taken", len(cfg.GetEnvs()), maxEnvs)
	}
	for _, s := range append([]string{cfg.GetCmd(), cfg.GetCwd()}, cfg.GetArgs()...) {
		if strings.ContainsRune(s, 0) {
			return command{}, invalid("process.cmd, args and cwd must not contain NUL bytes")
		}
	}
	env, err := environment(cfg.GetEnvs(), user, set, tty)
	if err != nil {
		return command{}, err
	}
	dir, err := workdir(cfg.GetCwd(), user, set)
	if err != nil {
		return command{}, err
	}
	path, err := lookup(cfg.GetCmd(), dir, env["PATH"])
	if err != nil {
		return command{}, err
	}
	c := command{path: path, dir: dir, user: user, argv: append([]string{cfg.GetCmd()}, cfg.GetArgs()...)}
	for k, v := range env {
		c.env = append(c.env, k+"="+v)
	}
	return c, nil
}

// environment: what a login gives, then what /init gave, then what the request gives.
func environment(asked map[string]string, user account.Account, set settings.Values, tty bool) (map[string]string, error) {
	env := map[string]string{
		"PATH": defaultPath, "HOME": user.Home, "USER": user.Name, "LOGNAME": user.Name, "SHELL": user.Shell,
		"LANG": "C.UTF-8",
	}
	if tty {
		env["TERM"] = "xterm-256color"
	}
	for _, layer := range []map[string]string{set.Env, asked} {
		for k, v := range layer {
			if k == "" || strings.ContainsAny(k, "=\x00") || strings.ContainsRune(v, 0) {
				return nil, invalid("environment variable %q: a name is not empty and without '=', and neither name nor value has NUL bytes", k)
			}
			env[k] = v
		}
	}
	return env, nil
}

func workdir(asked string, user account.Account, set settings.Values) (string, error) {
	dir := asked
	if dir == "" {
		dir = set.Workdir
	}
	if dir == "" {
		dir = user.Home
	}
	if rest, ok := strings.CutPrefix(dir, "~/"); ok || dir == "~" {
		dir = filepath.Join(user.Home, strings.TrimPrefix(rest, "~"))
	}
	if !filepath.IsAbs(dir) {
		dir = filepath.Join(user.Home, dir)
	}
	st, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", invalid("cwd '%s' does not exist", dir)
	case err != nil:
		return "", invalid("cwd '%s' cannot be used: %v", dir, bare(err))
	case !st.IsDir():
		return "", invalid("cwd '%s' is not a directory", dir)
	}
	return dir, nil
}

// lookup finds the program as a shell in dir would, with the PATH that the process will have.
func lookup(cmd, dir, path string) (string, error) {
	if strings.Contains(cmd, "/") {
		file := cmd
		if !filepath.IsAbs(file) {
			file = filepath.Join(dir, file)
		}
		return file, executable(file)
	}
	var denied error
	for _, d := range filepath.SplitList(path) {
		if !filepath.IsAbs(d) {
			d = filepath.Join(dir, d)
		}
		file := filepath.Join(d, cmd)
		err := executable(file)
		if err == nil {
			return file, nil
		}
		if connect.CodeOf(err) == connect.CodePermissionDenied {
			denied = err
		}
	}
	if denied != nil {
		return "", denied
	}
	return "", connect.NewError(connect.CodeNotFound, fmt.Errorf("command '%s' was not found in PATH (%s)", cmd, path))
}

func executable(file string) error {
	st, err := os.Stat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("command '%s' does not exist", file))
	case err != nil:
		return invalid("command '%s' cannot be used: %v", file, bare(err))
	case st.IsDir():
		return invalid("command '%s' is a directory", file)
	case st.Mode()&0o111 == 0:
		return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("command '%s' is not executable", file))
	}
	return nil
}

// bare strips Go's operation and path from an error of the file system.
func bare(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}
