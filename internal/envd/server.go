package envd

import (
	"log/slog"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/envd/account"
	"github.com/wrenn-sandbox/wrenn/internal/envd/boot"
	"github.com/wrenn-sandbox/wrenn/internal/envd/cgroup"
	"github.com/wrenn-sandbox/wrenn/internal/envd/files"
	"github.com/wrenn-sandbox/wrenn/internal/envd/process"
	"github.com/wrenn-sandbox/wrenn/internal/envd/routes"
	"github.com/wrenn-sandbox/wrenn/internal/envd/settings"
	"github.com/wrenn-sandbox/wrenn/internal/gen/filesystem/filesystemconnect"
	"github.com/wrenn-sandbox/wrenn/internal/gen/process/processconnect"
)

// maxMessage bounds one RPC message in bytes.
const maxMessage = 16 << 20

// Config is what the agent is made of.
type Config struct {
	Settings *settings.Store
	Users    account.Database
	Cgroups  *cgroup.Tree // nil: user processes get no cgroups
	Machine  Machine      // nil: the agent does not run in a guest of its own
	Log      *slog.Logger
}

// Machine is the guest as a whole. boot.Machine is the real one.
type Machine interface {
	Assume(boot.Identity) error
	PowerOff() error
	FreezeFS() error
	AdvanceClock(to time.Time) error
	ThawFS() error
}

// server answers the small routes.
type server struct {
	Config
	cpu cpuMeter
}

// New makes the handler of the whole agent.
func New(cfg Config) http.Handler {
	s := &server{Config: cfg}
	rpc := []connect.HandlerOption{
		connect.WithReadMaxBytes(maxMessage),
		// Clients of this contract do not expect compressed streams, whatever their HTTP library accepts.
		connect.WithCompression("gzip", nil, nil),
	}
	mux := http.NewServeMux()
	mux.Handle(processconnect.NewProcessHandler(process.NewService(cfg.Users, cfg.Settings, cfg.Cgroups, cfg.Log), rpc...))
	store := files.NewService(cfg.Users, cfg.Settings)
	mux.Handle(filesystemconnect.NewFilesystemHandler(store, rpc...))
	mux.HandleFunc("GET "+routes.Files, store.Download)
	mux.HandleFunc("POST "+routes.Files, store.Upload)
	mux.HandleFunc("POST "+routes.Compose, store.Compose)
	mux.HandleFunc("GET "+routes.Health, s.health)
	mux.HandleFunc("GET "+routes.Metrics, s.metrics)
	mux.HandleFunc("GET "+routes.Envs, s.envs)
	mux.HandleFunc("POST "+routes.Init, s.init)
	mux.HandleFunc("POST "+routes.Clock, s.clock)
	mux.HandleFunc("POST "+routes.Freeze, s.freeze)
	mux.HandleFunc("POST "+routes.Unfreeze, s.unfreeze)
	mux.HandleFunc("POST "+routes.FSFreeze, s.machine(Machine.FreezeFS))
	mux.HandleFunc("POST "+routes.FSThaw, s.machine(Machine.ThawFS))
	mux.HandleFunc("POST "+routes.Collapse, s.collapse)
	mux.HandleFunc("POST "+routes.Shutdown, s.shutdown)
	return s.admit(mux)
}

// admit lets only requests pass that carry the access token, once there is one. Liveness is told to
// everybody; /files may carry a signature instead and checks that itself.
func (s *server) admit(next http.Handler) http.Handler {
	refuse := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Envd-Version", Version)
		open := r.URL.Path == routes.Health || r.URL.Path == routes.Files
		if open || s.Settings.Get().Admits(r.Header.Get("X-Access-Token")) {
			next.ServeHTTP(w, r)
			return
		}
		err := connect.NewError(connect.CodeUnauthenticated, errBadToken)
		if isRPC(r.URL.Path) && refuse.IsSupported(r) {
			_ = refuse.Write(w, r, err) // the client may be gone
			return
		}
		writeError(w, http.StatusUnauthorized, errBadToken.Error())
	})
}

func isRPC(path string) bool {
	return strings.HasPrefix(path, "/process.Process/") || strings.HasPrefix(path, "/filesystem.Filesystem/")
}

func (s *server) health(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusNoContent)
}

func (s *server) envs(w http.ResponseWriter, _ *http.Request) {
	env := s.Settings.Get().Env
	if env == nil {
		env = map[string]string{}
	}
	writeJSON(w, http.StatusOK, env)
}
