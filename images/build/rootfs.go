package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// epoch is the time of everything that an image's build makes (2025-01-01), so that the day of the build
// does not show.
const epoch = 1735689600

// diskSize is that of an image; it is sparse, and grows in the guest to what was asked at create.
const diskSize = 2 << 30

// recipe is one image.
type recipe struct {
	name     string
	uuid     string
	packages []string
}

func recipes() []recipe {
	minimal := []string{"bash", "ca-certificates", "curl", "iproute2", "less", "mount", "netbase", "passwd", "procps", "sudo"}
	base := append([]string{
		"build-essential", "file", "git", "jq", "nodejs", "npm", "openssh-client", "pkg-config", "python3", "python3-dev", "python3-pip", "python3-venv",
		"python-is-python3", "ripgrep", "rsync", "unzip", "vim-tiny", "wget", "xz-utils", "zip",
	}, minimal...)
	return []recipe{
		{"minimal", "57726e6e-0000-4000-8000-6d696e696d61", minimal},
		{"base", "57726e6e-0000-4000-8000-626173650000", base},
	}
}

// hooks finish the tree in "$1" from outside. Nothing in an image runs by itself or calls out.
func hooks() []string {
	return []string{
		`chroot "$1" useradd --create-home --shell /bin/bash --uid 1000 --user-group --groups sudo user`,
		`echo 'user ALL=(ALL:ALL) NOPASSWD: ALL' > "$1/etc/sudoers.d/user" && chmod 440 "$1/etc/sudoers.d/user"`,
		`echo wrenn > "$1/etc/hostname" && printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 wrenn\n' > "$1/etc/hosts"`,
		`: > "$1/etc/machine-id" && rm -f "$1/var/lib/dbus/machine-id" "$1/etc/resolv.conf" && : > "$1/etc/resolv.conf"`,
		`mkdir -p "$1/usr/local/bin"`,
		`rm -f "$1/etc/apt/apt.conf.d/99mmdebstrap" && printf 'APT::Periodic::Enable "0";\n' > "$1/etc/apt/apt.conf.d/90wrenn"`,
		`rm -f "$1"/etc/*- "$1/etc/.pwd.lock" "$1"/var/lib/dpkg/*-old "$1/var/cache/ldconfig/aux-cache" "$1"/var/cache/debconf/*-old`,
		`find "$1/var/log" -type f -delete`,
		`find "$1" -xdev -name __pycache__ -type d -prune -exec rm -rf {} +`,
	}
}

// excluded are paths of packages that a sandbox does not need; copyright files stay.
func excluded() []string {
	return []string{
		"path-exclude=/usr/share/man/*", "path-exclude=/usr/share/info/*", "path-exclude=/usr/share/locale/*",
		"path-exclude=/usr/share/doc/*", "path-include=/usr/share/doc/*/copyright", "path-exclude=/usr/share/lintian/*",
	}
}

// debootstrap writes the tree of r as a tar archive, and gives its packages.
func debootstrap(ctx context.Context, r recipe, src source, archive string) ([]pkg, error) {
	list := archive + ".packages"
	defer os.Remove(list)
	cmd := exec.CommandContext(ctx, "mmdebstrap", arguments(r, src, archive, list)...)
	cmd.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", epoch), "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive")
	cmd.Stdin = strings.NewReader(strings.Join(src.lines, "\n") + "\n")
	// Killed outright it would leave its mounts behind; this way it takes them down.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = time.Minute
	out := &tail{max: 4 << 10}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("mmdebstrap: %w; its last words:\n%s", err, out)
	}
	return readPackages(list)
}

// arguments of mmdebstrap, which writes the tree to archive and the names of its packages to list.
func arguments(r recipe, src source, archive, list string) []string {
	args := []string{"--quiet", "--variant=apt", "--format=tar", "--include=" + strings.Join(r.packages, ",")}
	for _, o := range excluded() {
		args = append(args, "--dpkgopt="+o)
	}
	for _, o := range src.options {
		args = append(args, "--aptopt="+o)
	}
	args = append(args, "--aptopt=Acquire::Languages \"none\"",
		// A hook cannot write here: without root it runs as another user. download can.
		`--customize-hook=dpkg-query --admindir="$1/var/lib/dpkg" -W -f '${Package} ${Version}\n' > "$1/packages"`,
		"--customize-hook=download /packages '"+list+"'", `--customize-hook=rm "$1/packages"`)
	for _, h := range hooks() {
		args = append(args, "--customize-hook="+h)
	}
	return append(args, src.suite, archive, "-")
}

func readPackages(file string) ([]pkg, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var packages []pkg
	for line := range strings.Lines(string(raw)) {
		if name, version, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			packages = append(packages, pkg{name, version})
		}
	}
	if len(packages) == 0 {
		return nil, errors.New("the image has no packages")
	}
	return packages, nil
}

// source is where packages come from.
type source struct {
	suite   string
	lines   []string // of sources.list
	options []string // of apt, e.g. a proxy
}

const (
	defaultSuite   = "bookworm"
	debianKeyring  = "/usr/share/keyrings/debian-archive-keyring.gpg"
	defaultMirror  = "http://deb.debian.org/debian"
	securityMirror = "http://deb.debian.org/debian-security"
)

var suitePattern = regexp.MustCompile(`^([a-z]+)(-updates|-security)?$`)

// hostSource takes the machine's own Debian sources, and Debian's usual ones on a machine that has none.
func hostSource(ctx context.Context) (source, error) {
	if _, err := os.Stat(debianKeyring); err != nil {
		return source{}, fmt.Errorf("%s is not there; install the package debian-archive-keyring", debianKeyring)
	}
	// One line per index that apt uses.
	out, err := output(ctx, "apt-get", "indextargets", "--format", "$(ORIGIN)|$(SITE)|$(RELEASE)|$(COMPONENT)", "Created-By: Packages")
	if err != nil {
		return source{}, err
	}
	s := parseSources(out)
	s.options, err = aptOptions(ctx)
	return s, err
}

func parseSources(targets string) source {
	var s source
	seen := map[string]bool{}
	for line := range strings.Lines(targets) {
		f := strings.Split(strings.TrimSpace(line), "|")
		if len(f) != 4 || f[0] != "Debian" || f[3] != "main" || seen[line] {
			continue
		}
		m := suitePattern.FindStringSubmatch(f[2])
		if m == nil || (s.suite != "" && m[1] != s.suite) {
			continue
		}
		seen[line], s.suite = true, m[1]
		s.lines = append(s.lines, sourceLine(f[1], f[2]))
	}
	if s.suite == "" {
		s.suite = defaultSuite
		s.lines = []string{
			sourceLine(defaultMirror, defaultSuite), sourceLine(defaultMirror, defaultSuite+"-updates"),
			sourceLine(securityMirror, defaultSuite+"-security"),
		}
	}
	return s
}

func sourceLine(uri, suite string) string {
	return fmt.Sprintf("deb [signed-by=%s] %s %s main", debianKeyring, uri, suite)
}

// aptOptions carries over how this machine reaches its mirror, and nothing else.
func aptOptions(ctx context.Context) ([]string, error) {
	dump, err := output(ctx, "apt-config", "dump")
	if err != nil {
		return nil, err
	}
	var options []string
	for line := range strings.Lines(dump) {
		line = strings.TrimSuffix(strings.TrimSpace(line), ";")
		for _, prefix := range []string{"Acquire::http::Proxy ", "Acquire::https::Proxy ", "Acquire::Check-Valid-Until ", "Acquire::Check-Date ", "Acquire::ForceIPv4 "} {
			if strings.HasPrefix(line, prefix) && !strings.HasSuffix(line, `""`) {
				options = append(options, line)
			}
		}
	}
	return options, nil
}

// tail keeps the last bytes written to it.
type tail struct {
	max int
	buf []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - t.max; over > 0 {
		t.buf = t.buf[over:]
	}
	return len(p), nil
}

func (t *tail) String() string { return string(t.buf) }

func (b *builder) scratch(name string) string { return filepath.Join(b.images, "tmp-"+name) }
