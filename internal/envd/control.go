package envd

import (
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/envd/cgroup"
)

// maxFreezeWait bounds how long a freeze may be waited for.
const maxFreezeWait = 60 * time.Second

// freeze stops user processes before a snapshot. With maxWaitMs it waits and tells what it saw.
func (s *server) freeze(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	mode := cgroup.Legacy
	switch q.Get("mode") {
	case "", string(cgroup.Legacy):
	case string(cgroup.Hierarchy):
		mode = cgroup.Hierarchy
	default:
		writeError(w, http.StatusBadRequest, "mode must be legacy or hierarchy")
		return
	}
	limit, err1 := number(q.Get("maxCgroups"))
	waitMS, err2 := number(q.Get("maxWaitMs"))
	if err := errors.Join(err1, err2); err != nil {
		writeError(w, http.StatusBadRequest, "maxCgroups and maxWaitMs must be whole numbers")
		return
	}
	wait := min(time.Duration(min(waitMS, maxFreezeWait.Milliseconds()))*time.Millisecond, maxFreezeWait)
	res, err := s.Cgroups.Freeze(r.Context(), mode, int(min(limit, 1<<20)), wait)
	switch {
	case errors.Is(err, cgroup.ErrBusy):
		writeError(w, http.StatusServiceUnavailable, err.Error())
	case err != nil:
		s.Log.Error("freeze failed", "error", err)
		writeError(w, http.StatusInternalServerError, "user processes could not be frozen")
	case wait > 0:
		writeJSON(w, http.StatusOK, res)
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

func number(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	return strconv.ParseInt(s, 10, 64)
}

func (s *server) unfreeze(w http.ResponseWriter, _ *http.Request) {
	switch err := s.Cgroups.Thaw(); {
	case errors.Is(err, cgroup.ErrBusy):
		writeError(w, http.StatusServiceUnavailable, err.Error())
	case err != nil:
		s.Log.Error("thaw failed", "error", err)
		writeError(w, http.StatusInternalServerError, "user processes could not be thawed")
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

// machine makes a route of something that is done to the guest as a whole.
func (s *server) machine(do func(Machine) error) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if !s.mayChangeMachine(w) {
			return
		}
		if err := do(s.Machine); err != nil {
			s.Log.Error("change of the machine failed", "error", err)
			writeError(w, http.StatusInternalServerError, "the guest could not do that: "+err.Error())
			return
		}
		w.WriteHeader(http.StatusNoContent)
	}
}

// mayChangeMachine refuses for an agent that runs anywhere but in a guest of its own.
func (s *server) mayChangeMachine(w http.ResponseWriter) bool {
	if s.Machine == nil {
		writeError(w, http.StatusConflict, "this agent was not started by the guest's init, so it may not change the machine")
	}
	return s.Machine != nil
}

// shutdown answers before it acts: the agent is among what init ends.
func (s *server) shutdown(w http.ResponseWriter, _ *http.Request) {
	if !s.mayChangeMachine(w) {
		return
	}
	w.WriteHeader(http.StatusNoContent)
	if err := http.NewResponseController(w).Flush(); err != nil {
		s.Log.Warn("the answer to shutdown could not be sent", "error", err)
	}
	if err := s.Machine.PowerOff(); err != nil {
		s.Log.Error("power off failed", "error", err)
	}
}
