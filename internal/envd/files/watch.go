package files

import (
	"context"
	"errors"
	"net/http"
	"path/filepath"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	filesystempb "github.com/wrenn-sandbox/wrenn/internal/gen/filesystem"
)

// Bounds of Keepalive-Ping-Interval, in seconds.
const (
	defaultKeepalive = 90
	maxKeepalive     = 3600
)

// watchRequest is what WatchDir and CreateWatcher ask for.
type watchRequest interface {
	GetPath() string
	GetRecursive() bool
	GetAllowNetworkMounts() bool
}

func (s *Service) openTree(req connect.AnyRequest, msg watchRequest) (*tree, error) {
	t, err := s.at(req, msg.GetPath())
	if err != nil {
		return nil, err
	}
	root, err := directory(t.path)
	if err != nil {
		return nil, rpcError(err)
	}
	if !msg.GetAllowNetworkMounts() && onNetwork(root) {
		return nil, rpcError(faultf(badRequest, "path '%s' is on a network mount, where changes made elsewhere are not seen; set allow_network_mounts to watch it all the same", t.path))
	}
	w, err := watchTree(root, msg.GetRecursive())
	return w, rpcError(err)
}

// onNetwork tells whether path is on a file system that others change without our kernel knowing.
func onNetwork(path string) bool {
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil {
		return false
	}
	switch st.Type & 0xffffffff {
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC & 0xffffffff, unix.V9FS_MAGIC, unix.FUSE_SUPER_MAGIC, unix.CEPH_SUPER_MAGIC:
		return true
	}
	return false
}

// WatchDir streams changes until the client goes away.
func (s *Service) WatchDir(ctx context.Context, req *connect.Request[filesystempb.WatchDirRequest], stream *connect.ServerStream[filesystempb.WatchDirResponse]) error {
	interval, err := keepalive(req.Header())
	if err != nil {
		return rpcError(err)
	}
	t, err := s.openTree(req, req.Msg)
	if err != nil {
		return err
	}
	defer t.close()
	if err := stream.Send(&filesystempb.WatchDirResponse{Event: &filesystempb.WatchDirResponse_Start{Start: &filesystempb.WatchDirResponse_StartEvent{}}}); err != nil {
		return err
	}
	changes, failed := pumpChanges(ctx, t)
	beat := time.NewTicker(interval)
	defer beat.Stop()
	for {
		select {
		case list := <-changes:
			for _, c := range list {
				ev := &filesystempb.WatchDirResponse_Filesystem{Filesystem: s.present(t.root, c, req.Msg.GetIncludeEntry())}
				if err := stream.Send(&filesystempb.WatchDirResponse{Event: ev}); err != nil {
					return err
				}
			}
			beat.Reset(interval)
		case <-beat.C:
			ev := &filesystempb.WatchDirResponse_Keepalive{Keepalive: &filesystempb.WatchDirResponse_KeepAlive{}}
			if err := stream.Send(&filesystempb.WatchDirResponse{Event: ev}); err != nil {
				return err
			}
		case err := <-failed:
			return watchError(err)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// pumpChanges reads the tree in a goroutine that ends with ctx or when the tree is closed. A client that
// does not read lets the kernel's queue fill: then the watch ends with errOverflow.
func pumpChanges(ctx context.Context, t *tree) (<-chan []change, <-chan error) {
	changes, failed := make(chan []change), make(chan error, 1)
	go func() {
		for {
			list, err := t.next()
			if err != nil {
				failed <- err
				return
			}
			select {
			case changes <- list:
			case <-ctx.Done():
				return
			}
		}
	}()
	return changes, failed
}

func watchError(err error) error {
	if errors.Is(err, errOverflow) {
		return connect.NewError(connect.CodeDataLoss, errOverflow)
	}
	return rpcError(watchFault(err, "watched"))
}

// present makes the event of a change; the entry is what is there now, if anything is.
func (s *Service) present(root string, c change, includeEntry bool) *filesystempb.FilesystemEvent {
	ev := &filesystempb.FilesystemEvent{Name: c.name, Type: c.kind}
	if includeEntry {
		if e, err := describe(filepath.Join(root, c.name), s.users.Names()); err == nil {
			ev.Entry = e
		}
	}
	return ev
}

// keepalive reads Keepalive-Ping-Interval.
func keepalive(h http.Header) (time.Duration, error) {
	raw := h.Get("Keepalive-Ping-Interval")
	if raw == "" {
		return defaultKeepalive * time.Second, nil
	}
	n, err := strconv.Atoi(raw)
	if err != nil || n < 1 || n > maxKeepalive {
		return 0, faultf(badRequest, "Keepalive-Ping-Interval %q: a whole number of seconds from 1 to %d is needed", raw, maxKeepalive)
	}
	return time.Duration(n) * time.Second, nil
}
