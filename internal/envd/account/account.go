// Package account reads the guest's own user database, /etc/passwd and /etc/group, and tells on whose
// behalf a request acts. It never changes the database and asks no name service: the guest agent is a
// static binary and must work in any image.
package account

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
)

// ErrUnknown is wrapped by the errors of lookups of names that are not in the database.
var ErrUnknown = errors.New("unknown user")

// maxName bounds a user name, as useradd does.
const maxName = 32

// maxDatabase bounds how much of a database file is read: a user of the guest may write the file.
const maxDatabase = 4 << 20

// Account is one user with everything a process of theirs needs.
type Account struct {
	Name   string
	UID    uint32
	GID    uint32
	Groups []uint32 // supplementary
	Home   string
	Shell  string
}

// Database names the two files; System is the usual pair.
type Database struct {
	Passwd string
	Group  string
}

// System is the database of the running guest.
func System() Database { return Database{Passwd: "/etc/passwd", Group: "/etc/group"} }

// Lookup finds a user by name.
func (d Database) Lookup(name string) (Account, error) {
	if name == "" || len(name) > maxName || strings.ContainsAny(name, ":\n\x00") {
		return Account{}, fmt.Errorf("%w %q", ErrUnknown, clip(name))
	}
	var found *Account
	err := scan(d.Passwd, 7, func(f []string) bool {
		if f[0] != name {
			return true
		}
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if err1 != nil || err2 != nil {
			return true
		}
		found = &Account{Name: name, UID: uint32(uid), GID: uint32(gid), Home: f[5], Shell: f[6]}
		return false
	})
	if err != nil {
		return Account{}, err
	}
	if found == nil {
		return Account{}, fmt.Errorf("%w %q", ErrUnknown, name)
	}
	if found.Home == "" {
		found.Home = "/"
	}
	if found.Shell == "" {
		found.Shell = "/bin/sh"
	}
	found.Groups, err = d.groupsOf(name, found.GID)
	return *found, err
}

func (d Database) groupsOf(name string, primary uint32) ([]uint32, error) {
	groups := []uint32{primary}
	err := scan(d.Group, 4, func(f []string) bool {
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if err == nil && slices.Contains(strings.Split(f[3], ","), name) && !slices.Contains(groups, uint32(gid)) {
			groups = append(groups, uint32(gid))
		}
		return true
	})
	return groups, err
}

// Names maps ids to names, for listings of files.
type Names struct {
	users, groups map[uint32]string
}

// Names loads the whole database. Ids without a name are shown as numbers.
func (d Database) Names() Names {
	n := Names{users: map[uint32]string{}, groups: map[uint32]string{}}
	collect := func(path string, fields int, into map[uint32]string) {
		// An unreadable database only means that ids are shown as numbers.
		_ = scan(path, fields, func(f []string) bool {
			if id, err := strconv.ParseUint(f[2], 10, 32); err == nil {
				if _, dup := into[uint32(id)]; !dup {
					into[uint32(id)] = f[0]
				}
			}
			return true
		})
	}
	collect(d.Passwd, 7, n.users)
	collect(d.Group, 4, n.groups)
	return n
}

// User is the name of a uid.
func (n Names) User(uid uint32) string { return nameOr(n.users, uid) }

// Group is the name of a gid.
func (n Names) Group(gid uint32) string { return nameOr(n.groups, gid) }

func nameOr(names map[uint32]string, id uint32) string {
	if name, ok := names[id]; ok {
		return name
	}
	return strconv.FormatUint(uint64(id), 10)
}

// scan calls visit with the fields of every well-formed line until it returns false.
func scan(path string, fields int, visit func([]string) bool) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read the user database: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(io.LimitReader(f, maxDatabase))
	lines.Buffer(make([]byte, 0, 4096), 1<<20)
	for lines.Scan() {
		parts := strings.Split(lines.Text(), ":")
		if len(parts) != fields || parts[0] == "" || strings.HasPrefix(parts[0], "#") {
			continue
		}
		if !visit(parts) {
			return nil
		}
	}
	return lines.Err()
}

func clip(s string) string {
	if len(s) > maxName {
		return s[:maxName] + "…"
	}
	return s
}
