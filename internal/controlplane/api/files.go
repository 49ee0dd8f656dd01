package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	gen "github.com/wrenn-sandbox/wrenn/internal/gen/api"
	"github.com/wrenn-sandbox/wrenn/internal/gen/filesystem"
	"github.com/wrenn-sandbox/wrenn/internal/gen/filesystem/filesystemconnect"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

const (
	copyBuffer    = 256 << 10
	uploadStall   = time.Minute // an upload that stands still for so long has died
	maxGuestReply = 1 << 20
)

// fileHeaders of the guest's answer that are passed on.
var fileHeaders = [...]string{"Content-Length", "Content-Range", "Accept-Ranges", "Last-Modified", "ETag"}

// readFile streams a file out of a sandbox.
func (s *Server) readFile(w http.ResponseWriter, r *http.Request) {
	res, err := held(r.Context(), s, r.PathValue("id"), func(g guest) (*http.Response, error) { return s.guestFiles(r, g, r.Method, nil) })
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK && res.StatusCode != http.StatusPartialContent {
		s.failFile(w, r, res)
		return
	}
	for _, h := range fileHeaders {
		if v := res.Header.Get(h); v != "" {
			w.Header().Set(h, v)
		}
	}
	// Whatever it is, a browser shall save it, not run it under our name.
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Disposition", "attachment")
	w.WriteHeader(res.StatusCode)
	if r.Method == http.MethodHead {
		return
	}
	if _, err := io.CopyBuffer(plainWriter{w}, res.Body, make([]byte, copyBuffer)); err != nil {
		panic(http.ErrAbortHandler) // cut the connection: the answer must not look whole
	}
}

// plainWriter hides ReadFrom, which would choose a smaller buffer.
type plainWriter struct{ io.Writer }

// writeFile streams a file into a sandbox.
func (s *Server) writeFile(w http.ResponseWriter, r *http.Request) {
	body := &upload{Reader: r.Body, rc: http.NewResponseController(w)}
	res, err := held(r.Context(), s, r.PathValue("id"), func(g guest) (*http.Response, error) {
		res, err := s.guestFiles(r, g, http.MethodPost, body)
		if errors.Is(err, errPaused) && body.begun.Load() { // what was read of it cannot be had again
			err = wrenn.Errorf(wrenn.KindInvalidState, "the sandbox was paused when the transfer began; try again")
		}
		return res, err
	})
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer res.Body.Close()
	if res.StatusCode >= 300 {
		s.failFile(w, r, res)
		return
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, maxGuestReply))
	entry, err := s.stat(r.Context(), r.PathValue("id"), r.URL.Query().Get("path"), userParam(r))
	if err != nil {
		s.fail(w, r, err)
		return
	}
	writeJSON(w, http.StatusOK, entry)
}

// upload is a body that must keep moving.
type upload struct {
	io.Reader
	rc    *http.ResponseController
	begun atomic.Bool // something of it may have been read
}

func (u *upload) Read(p []byte) (int, error) {
	u.begun.Store(true)
	_ = u.rc.SetReadDeadline(time.Now().Add(uploadStall)) // not every connection has deadlines
	n, err := u.Reader.Read(p)
	if err != nil {
		_ = u.rc.SetReadDeadline(time.Time{})
	}
	return n, err
}

func userParam(r *http.Request) *string {
	if u := r.URL.Query().Get("user"); u != "" {
		return &u
	}
	return nil
}

// guestFiles asks the guest's /files. The body, if there is one, is r's: it is not sent before the host lets the
// request through to the guest.
func (s *Server) guestFiles(r *http.Request, g guest, method string, body io.Reader) (*http.Response, error) {
	q := url.Values{"path": {r.URL.Query().Get("path")}}
	if u := userParam(r); u != nil {
		q.Set("username", *u)
	}
	req, err := http.NewRequestWithContext(r.Context(), method, agents.GuestURL(g.target, g.id)+"/files?"+q.Encode(), body)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.ContentLength = r.ContentLength
		if r.ContentLength == 0 {
			req.Body = http.NoBody
		} else {
			req.Header.Set("Expect", "100-continue")
		}
		req.Header.Set("Content-Type", "application/octet-stream")
	}
	if v := r.Header.Get("Range"); v != "" {
		req.Header.Set("Range", v)
	}
	req.Header.Set("Accept-Encoding", "identity")
	res, err := s.Agents.Client(g.target).Do(req)
	if err != nil {
		return nil, wrenn.Wrap(err, wrenn.KindHostUnavailable, "the sandbox's host cannot be reached, or the transfer was cut off; try again")
	}
	if wrenn.Kind(res.Header.Get(rpc.KindHeader)) == wrenn.KindInvalidState {
		defer res.Body.Close()
		return nil, refused(nil, wrenn.Errorf(wrenn.KindInvalidState, "%s", saidIn(res)))
	}
	return res, nil
}

// saidIn is the message in an error of the guest's /files, or of the agent on the way to it.
func saidIn(res *http.Response) string {
	var said struct {
		Message string `json:"message"`
	}
	raw, _ := io.ReadAll(io.LimitReader(res.Body, maxGuestReply))
	_ = json.Unmarshal(raw, &said)
	if said.Message == "" {
		return "the sandbox answered " + strconv.Itoa(res.StatusCode)
	}
	return clip(said.Message, maxGuestMessage)
}

// fileKinds are what the guest's /files answers mean.
var fileKinds = map[int]wrenn.Kind{
	http.StatusBadRequest:          wrenn.KindInvalidRequest,
	http.StatusUnauthorized:        wrenn.KindInvalidRequest, // no such user
	http.StatusForbidden:           wrenn.KindForbidden,
	http.StatusNotFound:            wrenn.KindNotFound,
	http.StatusInsufficientStorage: wrenn.KindDiskFull,
}

// failFile passes an error of the guest's /files, or of the agent on the way to it, on to the user.
func (s *Server) failFile(w http.ResponseWriter, r *http.Request, res *http.Response) {
	message := saidIn(res)
	if res.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		w.Header().Set("Content-Range", res.Header.Get("Content-Range"))
		e := invalid("Range", "is not within the file")
		note(r.Context(), e)
		writeError(w, r, res.StatusCode, e)
		return
	}
	kind, ok := fileKinds[res.StatusCode]
	if fromAgent := wrenn.Kind(res.Header.Get(rpc.KindHeader)); fromAgent != "" {
		kind, ok = fromAgent, true
		if kind == wrenn.KindNotFound {
			kind, message = wrenn.KindAgentError, "the host does not have this sandbox; its state is as last known"
		}
	}
	if !ok {
		kind = wrenn.KindAgentError
	}
	s.fail(w, r, wrenn.Errorf(kind, "%s", message))
}

// filesCall makes one short call of the guest's filesystem service.
func filesCall[T any](ctx context.Context, s *Server, id string, call func(context.Context, filesystemconnect.FilesystemClient) (*connect.Response[T], error)) (*T, error) {
	return held(ctx, s, id, func(g guest) (*T, error) {
		ctx, cancel := context.WithTimeout(ctx, unaryLimit)
		defer cancel()
		res, err := call(ctx, s.Agents.Filesystem(g.target, g.id))
		if err != nil {
			return nil, guestError(err)
		}
		return res.Msg, nil
	})
}

func request[T any](msg *T, user *string) *connect.Request[T] {
	req := connect.NewRequest(msg)
	asUser(req.Header(), user)
	return req
}

func (s *Server) stat(ctx context.Context, id, path string, user *string) (gen.FileEntry, error) {
	res, err := filesCall(ctx, s, id, func(ctx context.Context, fs filesystemconnect.FilesystemClient) (*connect.Response[filesystem.StatResponse], error) {
		return fs.Stat(ctx, request(&filesystem.StatRequest{Path: path}, user))
	})
	if err != nil {
		return gen.FileEntry{}, err
	}
	return entryJSON(res.GetEntry()), nil
}

// StatFile implements gen.StrictServerInterface.
func (s *Server) StatFile(ctx context.Context, req gen.StatFileRequestObject) (gen.StatFileResponseObject, error) {
	entry, err := s.stat(ctx, req.ID, req.Params.Path, req.Params.User)
	return gen.StatFile200JSONResponse(entry), err
}

// ListFiles implements gen.StrictServerInterface.
func (s *Server) ListFiles(ctx context.Context, req gen.ListFilesRequestObject) (gen.ListFilesResponseObject, error) {
	res, err := filesCall(ctx, s, req.ID, func(ctx context.Context, fs filesystemconnect.FilesystemClient) (*connect.Response[filesystem.ListDirResponse], error) {
		return fs.ListDir(ctx, request(&filesystem.ListDirRequest{Path: req.Params.Path, Depth: uint32(or(req.Params.Depth, 1))}, req.Params.User))
	})
	if err != nil {
		return nil, err
	}
	out := gen.ListFiles200JSONResponse{Entries: make([]gen.FileEntry, 0, len(res.GetEntries()))}
	for _, e := range res.GetEntries() {
		out.Entries = append(out.Entries, entryJSON(e))
	}
	return out, nil
}

// MakeDir implements gen.StrictServerInterface.
func (s *Server) MakeDir(ctx context.Context, req gen.MakeDirRequestObject) (gen.MakeDirResponseObject, error) {
	res, err := filesCall(ctx, s, req.ID, func(ctx context.Context, fs filesystemconnect.FilesystemClient) (*connect.Response[filesystem.MakeDirResponse], error) {
		return fs.MakeDir(ctx, request(&filesystem.MakeDirRequest{Path: req.Body.Path}, req.Body.User))
	})
	if err != nil {
		return nil, err
	}
	return gen.MakeDir201JSONResponse(entryJSON(res.GetEntry())), nil
}

// MoveFile implements gen.StrictServerInterface.
func (s *Server) MoveFile(ctx context.Context, req gen.MoveFileRequestObject) (gen.MoveFileResponseObject, error) {
	res, err := filesCall(ctx, s, req.ID, func(ctx context.Context, fs filesystemconnect.FilesystemClient) (*connect.Response[filesystem.MoveResponse], error) {
		return fs.Move(ctx, request(&filesystem.MoveRequest{Source: req.Body.Source, Destination: req.Body.Destination}, req.Body.User))
	})
	if err != nil {
		return nil, err
	}
	return gen.MoveFile200JSONResponse(entryJSON(res.GetEntry())), nil
}

// RemoveFile implements gen.StrictServerInterface.
func (s *Server) RemoveFile(ctx context.Context, req gen.RemoveFileRequestObject) (gen.RemoveFileResponseObject, error) {
	_, err := filesCall(ctx, s, req.ID, func(ctx context.Context, fs filesystemconnect.FilesystemClient) (*connect.Response[filesystem.RemoveResponse], error) {
		return fs.Remove(ctx, request(&filesystem.RemoveRequest{Path: req.Params.Path}, req.Params.User))
	})
	if err != nil {
		return nil, err
	}
	return gen.RemoveFile204Response{}, nil
}

// watchFiles streams the changes of a directory over a WebSocket.
func (s *Server) watchFiles(w http.ResponseWriter, r *http.Request) {
	g, err := s.guest(r.Context(), r.PathValue("id"))
	if err != nil {
		s.fail(w, r, err)
		return
	}
	k, ok := s.upgrade(w, r)
	if !ok {
		return
	}
	q := r.URL.Query()
	recursive, _ := strconv.ParseBool(q.Get("recursive")) // checked against the contract
	k.end(func() error {
		defer context.AfterFunc(k.conn.CloseRead(k.ctx), k.stop)() // the client has nothing to say; reading tells when it leaves
		_, err := held(k.ctx, s, g.id, func(g guest) (struct{}, error) {
			stream, err := s.Agents.Filesystem(g.target, g.id).WatchDir(k.ctx, request(&filesystem.WatchDirRequest{Path: q.Get("path"), Recursive: recursive}, userParam(r)))
			if err != nil {
				return struct{}{}, guestError(err)
			}
			defer stream.Close()
			return struct{}{}, k.passWatch(stream)
		})
		return err
	}())
}

// passWatch passes what happens in a watched directory to the client, until it leaves or the watch ends.
func (k *socket) passWatch(stream *connect.ServerStreamForClient[filesystem.WatchDirResponse]) error {
	for stream.Receive() {
		if m, ok := watchMessage(stream.Msg()); ok {
			if err := k.send(m); err != nil {
				return errors.Join(errGone, err)
			}
		}
	}
	if err := stream.Err(); err != nil {
		return guestError(err)
	}
	return wrenn.Errorf(wrenn.KindAgentError, "the watch ended; connect again")
}

var watchEvents = map[filesystem.EventType]gen.WatchMessageEvent{
	filesystem.EventType_EVENT_TYPE_CREATE: gen.WatchMessageEventCreate,
	filesystem.EventType_EVENT_TYPE_WRITE:  gen.WatchMessageEventWrite,
	filesystem.EventType_EVENT_TYPE_REMOVE: gen.WatchMessageEventRemove,
	filesystem.EventType_EVENT_TYPE_RENAME: gen.WatchMessageEventRename,
	filesystem.EventType_EVENT_TYPE_CHMOD:  gen.WatchMessageEventChmod,
}

func watchMessage(m *filesystem.WatchDirResponse) (gen.WatchMessage, bool) {
	switch ev := m.GetEvent().(type) {
	case *filesystem.WatchDirResponse_Start:
		return gen.WatchMessage{Type: gen.WatchMessageTypeStart}, true
	case *filesystem.WatchDirResponse_Filesystem:
		kind, ok := watchEvents[ev.Filesystem.GetType()]
		name := ev.Filesystem.GetName()
		return gen.WatchMessage{Type: gen.WatchMessageTypeEvent, Event: &kind, Name: &name}, ok
	}
	return gen.WatchMessage{}, false
}

var entryTypes = map[filesystem.FileType]gen.FileEntryType{
	filesystem.FileType_FILE_TYPE_FILE:      gen.FileEntryTypeFile,
	filesystem.FileType_FILE_TYPE_DIRECTORY: gen.FileEntryTypeDirectory,
	filesystem.FileType_FILE_TYPE_SYMLINK:   gen.FileEntryTypeSymlink,
}

func entryJSON(e *filesystem.EntryInfo) gen.FileEntry {
	out := gen.FileEntry{
		Name: e.GetName(), Type: gen.FileEntryTypeOther, Path: e.GetPath(), Size: e.GetSize(), Mode: int64(e.GetMode()),
		Permissions: e.GetPermissions(), Owner: e.GetOwner(), Group: e.GetGroup(), SymlinkTarget: e.SymlinkTarget,
	}
	if t, ok := entryTypes[e.GetType()]; ok {
		out.Type = t
	}
	if e.GetModifiedTime() != nil {
		at := e.GetModifiedTime().AsTime()
		out.ModifiedAt = &at
	}
	return out
}
