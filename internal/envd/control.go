package envd

import (
	"encoding/json"
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

// maxClockBody bounds the body of POST /clock: {"timestamp": RFC 3339}.
const maxClockBody = 1 << 10

// clock advances the guest's clock to a time that its host tells. Of several times told it so keeps that of the message
// that was under way for least. It touches nothing else, so it may come at any time.
func (s *server) clock(w http.ResponseWriter, r *http.Request) {
	if !s.mayChangeMachine(w) {
		return
	}
	var body struct {
		Timestamp time.Time `json:"timestamp"`
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxClockBody)).Decode(&body); err != nil || body.Timestamp.IsZero() {
		writeError(w, http.StatusBadRequest, "the body is not {\"timestamp\": …} with a time of RFC 3339")
		return
	}
	if err := s.Machine.AdvanceClock(body.Timestamp); err != nil {
		s.Log.Error("the clock could not be set", "error", err)
		writeError(w, http.StatusInternalServerError, "the guest's clock could not be set")
		return
	}
	w.WriteHeader(http.StatusNoContent)
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
