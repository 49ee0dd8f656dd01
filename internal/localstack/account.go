package localstack

import (
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// bindTarget is where a daemon sees its data directory when its user cannot reach the real place,
// for instance below /root. The mount is in the daemon's own mount namespace and goes with it.
const bindTarget = "/mnt"

// account is the unprivileged user a daemon runs as.
type account struct {
	name     string
	uid, gid int
}

// unprivileged is the first of the named users that exists if we are root, else nil: then daemons
// simply run as the caller.
func unprivileged(names ...string) (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range append(names, "nobody") {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, uerr := strconv.Atoi(u.Uid)
		gid, gerr := strconv.Atoi(u.Gid)
		if uerr == nil && gerr == nil && uid != 0 {
			return &account{name: name, uid: uid, gid: gid}, nil
		}
	}
	return nil, fmt.Errorf("none of the users %v and nobody exists: servers must not run as root", names)
}

// own makes dir, for the account alone.
func (a *account) own(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return a.chown(dir)
}

func (a *account) chown(path string) error {
	if a == nil {
		return nil
	}
	return os.Chown(path, a.uid, a.gid)
}

// canReach tells whether the account may walk to dir, which must be absolute.
func (a *account) canReach(dir string) bool {
	if a == nil {
		return true
	}
	for d := filepath.Dir(dir); ; d = filepath.Dir(d) {
		info, err := os.Stat(d)
		if err != nil || !a.mayEnter(info) {
			return false
		}
		if d == "/" {
			return true
		}
	}
}

func (a *account) mayEnter(info os.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return false
	}
	bit := os.FileMode(0o001)
	switch {
	case int(st.Uid) == a.uid:
		bit = 0o100
	case int(st.Gid) == a.gid:
		bit = 0o010
	}
	return info.Mode().Perm()&bit != 0
}
