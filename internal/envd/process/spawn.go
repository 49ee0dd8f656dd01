package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"connectrpc.com/connect"
	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/envd/cgroup"
	processpb "github.com/wrenn-sandbox/wrenn/internal/gen/process"
)

// stdio is both sides of a new process's standard files.
type stdio struct {
	child [3]*os.File // given to the process and closed here
	in    *os.File    // our writable end, may be nil
	out   []source    // our readable ends
	tty   *os.File    // the terminal's master side, if there is one
}

type source struct {
	file *os.File
	wrap wrap
}

// closeChild closes what only the process needs.
func (s *stdio) closeChild() {
	for _, f := range s.child {
		if f != nil {
			f.Close()
		}
	}
}

// closeOurs closes the rest, after a start that failed.
func (s *stdio) closeOurs() {
	for _, f := range []*os.File{s.in, s.tty} {
		if f != nil {
			f.Close()
		}
	}
	for _, src := range s.out {
		src.file.Close()
	}
}

func openPipes(stdin bool) (s *stdio, err error) {
	s = &stdio{}
	defer func() {
		if err != nil {
			s.closeChild()
			s.closeOurs()
		}
	}()
	if stdin {
		s.child[0], s.in, err = os.Pipe()
	} else {
		s.child[0], err = os.Open(os.DevNull)
	}
	if err != nil {
		return s, err
	}
	for i, w := range []wrap{asStdout, asStderr} {
		r, c, err := os.Pipe()
		if err != nil {
			return s, err
		}
		s.child[i+1] = c
		s.out = append(s.out, source{r, w})
	}
	return s, nil
}

func openTerminal(size *processpb.PTY_Size, uid uint32) (*stdio, error) {
	blocking, slave, err := pty.Open()
	if err != nil {
		return nil, err
	}
	master, err := pollable(blocking)
	if err != nil {
		slave.Close()
		return nil, err
	}
	s := &stdio{tty: master, child: [3]*os.File{slave}, out: []source{{master, asPTY}}}
	if err := resize(master, size); err != nil {
		s.closeChild()
		s.tty.Close()
		return nil, err
	}
	if os.Geteuid() == 0 {
		_ = slave.Chown(int(uid), -1) // so that programs may open it by name; not vital
	}
	return s, nil
}

// pollable gives f in a form whose reads and writes can be given deadlines, and closes f.
func pollable(f *os.File) (*os.File, error) {
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

func resize(master *os.File, size *processpb.PTY_Size) error {
	cols, rows := min(size.GetCols(), 0xffff), min(size.GetRows(), 0xffff)
	if cols == 0 {
		cols = 80
	}
	if rows == 0 {
		rows = 24
	}
	conn, err := master.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = conn.Control(func(fd uintptr) {
		set = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: uint16(cols), Row: uint16(rows)})
	})
	return errors.Join(err, set)
}

// spawn starts c with the given files in a session and a cgroup of its own.
func spawn(c command, s *stdio, tree *cgroup.Tree) (*os.Process, *cgroup.Group, error) {
	kind := cgroup.User
	attr := &syscall.SysProcAttr{Setsid: true}
	files := s.child[:]
	if s.tty != nil {
		kind = cgroup.PTY
		attr.Setctty, attr.Ctty = true, 0
		files = []*os.File{s.child[0], s.child[0], s.child[0]}
	}
	if os.Geteuid() == 0 {
		attr.Credential = &syscall.Credential{Uid: c.user.UID, Gid: c.user.GID, Groups: c.user.Groups}
	} else if int(c.user.UID) != os.Getuid() {
		return nil, nil, connect.NewError(connect.CodePermissionDenied,
			fmt.Errorf("the guest agent does not run as root and cannot act as user '%s'", c.user.Name))
	}
	group, err := tree.New(kind)
	if err != nil {
		return nil, nil, connect.NewError(connect.CodeInternal, err)
	}
	if fd, ok := group.FD(); ok {
		attr.UseCgroupFD, attr.CgroupFD = true, fd
	}
	p, err := os.StartProcess(c.path, c.argv, &os.ProcAttr{Dir: c.dir, Env: c.env, Files: files, Sys: attr})
	if err != nil {
		group.Release()
		return nil, nil, startError(c, err)
	}
	return p, group, nil
}

func startError(c command, err error) error {
	code := connect.CodeInternal
	switch {
	case errors.Is(err, fs.ErrPermission):
		code = connect.CodePermissionDenied
	case errors.Is(err, fs.ErrNotExist): // the program is there: its interpreter is not
		code = connect.CodeNotFound
	case errors.Is(err, unix.E2BIG), errors.Is(err, unix.ENOEXEC), errors.Is(err, unix.ENAMETOOLONG):
		code = connect.CodeInvalidArgument
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM):
		code = connect.CodeResourceExhausted
	}
	return connect.NewError(code, fmt.Errorf("command '%s' cannot be started in '%s' as user '%s': %w", c.path, c.dir, c.user.Name, bare(err)))
}
