package api

import (
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const maxSignal = 64 // of Linux

// parseSignal reads a signal's number or its name with or without SIG.
func parseSignal(text string) (int32, error) {
	if n, err := strconv.Atoi(text); err == nil {
		if n < 1 || n > maxSignal {
			return 0, invalid("signal", "is a number from 1 to %d or a name such as SIGTERM", maxSignal)
		}
		return int32(n), nil
	}
	name := text
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n := unix.SignalNum(name); n != 0 {
		return int32(n), nil
	}
	return 0, invalid("signal", "there is no %q; use a name such as SIGTERM or a number", text)
}

// signalOf reads the signal out of the guest's words for how a process ended, such as "signal: killed
// (core dumped)" (os.ProcessState).
func signalOf(status string) (name string, number int32) {
	words, ok := strings.CutPrefix(status, "signal: ")
	if !ok {
		return "", 0
	}
	words = strings.TrimSuffix(words, " (core dumped)")
	for n := 1; n <= maxSignal; n++ {
		sig := syscall.Signal(n)
		if sig.String() != words {
			continue
		}
		if name := unix.SignalName(sig); name != "" {
			return name, int32(n)
		}
		return "SIG" + strconv.Itoa(n), int32(n)
	}
	return "", 0
}
