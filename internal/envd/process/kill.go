package process

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// killSession kills every process of a session, for guests without cgroup v2. It looks again until
// nothing new is found, since what is being killed may fork meanwhile; the bound keeps a fork bomb from
// holding us.
func killSession(sid int) {
	for range 16 {
		found := false
		for _, pid := range pidsInSession(sid) {
			if pid != sid && unix.Kill(pid, unix.SIGKILL) == nil {
				found = true
			}
		}
		if !found {
			return
		}
	}
}

// pidsInSession lists the living processes of a session.
func pidsInSession(sid int) []int {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil
	}
	var pids []int
	for _, path := range stats {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue // it ended
		}
		// pid (comm) state ppid pgrp session: comm may hold anything, so count from its last ")".
		_, rest, ok := bytes.Cut(raw[max(bytes.LastIndexByte(raw, ')'), 0):], []byte(" "))
		fields := bytes.Fields(rest)
		if !ok || len(fields) < 4 || fields[0][0] == 'Z' {
			continue
		}
		if session, err := strconv.Atoi(string(fields[3])); err != nil || session != sid {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}
