package files

import (
	"os"
	"path/filepath"
	"syscall"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-sandbox/wrenn/internal/envd/account"
	filesystempb "github.com/wrenn-sandbox/wrenn/internal/gen/filesystem"
)

// describe makes the entry of path. A link is described itself, but its type is that of what it leads to
// (clients show only files and directories); FILE_TYPE_SYMLINK is a link that leads nowhere.
func describe(path string, names account.Names) (*filesystempb.EntryInfo, error) {
	st, err := os.Lstat(path)
	if err != nil {
		return nil, explain(err, path)
	}
	return entry(path, st, names), nil
}

func entry(path string, st os.FileInfo, names account.Names) *filesystempb.EntryInfo {
	e := &filesystempb.EntryInfo{
		Name: filepath.Base(path), Path: path, Size: st.Size(), Type: fileType(st.Mode()),
		Mode: uint32(st.Mode().Perm()), Permissions: st.Mode().String(), ModifiedTime: timestamppb.New(st.ModTime()),
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		e.Owner, e.Group = names.User(sys.Uid), names.Group(sys.Gid)
	}
	if st.Mode()&os.ModeSymlink != 0 {
		target, err := filepath.EvalSymlinks(path)
		if err != nil {
			target, _ = os.Readlink(path) // it was a link a moment ago; if not, the target is unknown
		} else if tst, err := os.Stat(target); err == nil {
			e.Type = fileType(tst.Mode())
		}
		e.SymlinkTarget = &target
	}
	if st.Mode().IsRegular() || st.IsDir() {
		e.Metadata = readMetadata(path)
	}
	return e
}

// fileType knows files, directories and links; sockets, pipes and devices are of no type.
func fileType(m os.FileMode) filesystempb.FileType {
	switch {
	case m.IsRegular():
		return filesystempb.FileType_FILE_TYPE_FILE
	case m.IsDir():
		return filesystempb.FileType_FILE_TYPE_DIRECTORY
	case m&os.ModeSymlink != 0:
		return filesystempb.FileType_FILE_TYPE_SYMLINK
	default:
		return filesystempb.FileType_FILE_TYPE_UNSPECIFIED
	}
}
