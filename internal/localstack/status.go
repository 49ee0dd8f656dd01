package localstack

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	wrennsdk "github.com/wrenn-sandbox/wrenn/sdk/go"
)

// Part is one program of the stack as it is now.
type Part struct {
	Name    string `json:"name"`
	Running bool   `json:"running"`
	// Healthy tells whether it answers, not only lives.
	Healthy  bool   `json:"healthy"`
	PID      int    `json:"pid,omitempty"`
	MemoryMB int    `json:"memory_mb,omitempty"`
	Address  string `json:"address,omitempty"`
	Note     string `json:"note,omitempty"`
	Log      string `json:"log,omitempty"`
}

// Status looks at every part. It changes nothing and needs no root.
func (s *Stack) Status(ctx context.Context) []Part {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	db := func(name, dir string) Part {
		p, ok := loadProcess(filepath.Join(s.path(dir), "pid"))
		part := Part{Name: name, Log: s.logFile(dir)}
		if ok && p.alive() {
			part.Running, part.PID, part.Address = true, p.PID, fmt.Sprintf("127.0.0.1:%d", p.Port)
			part.Healthy = portFree(ctx, p.Port) != nil
		}
		return part
	}
	parts := []Part{db("PostgreSQL", "postgres"), db("Redis", "redis"), s.ours("wrenn-cp", s.URL()), s.ours("wrenn-agent", s.agentAddress())}
	if cp := &parts[2]; cp.Running {
		s.askControlPlane(ctx, cp, &parts[3])
	}
	for i := range parts {
		if parts[i].Running {
			parts[i].MemoryMB = residentMB(parts[i].PID)
		}
	}
	return parts
}

func (s *Stack) ours(name, address string) Part {
	part := Part{Name: name, Log: s.logFile(name)}
	if p, ok := s.running(name); ok {
		part.Running, part.PID, part.Address = true, p.PID, address
	}
	return part
}

// askControlPlane asks whether it is ready, and what it knows of this host.
func (s *Stack) askControlPlane(ctx context.Context, cp, agent *Part) {
	env, err := s.loadEnv()
	if err != nil {
		cp.Note = "the env file cannot be read: run this as the user who ran `wrenn up`"
		return
	}
	c, err := wrennsdk.New(wrennsdk.WithURL(s.URL()), wrennsdk.WithAPIKey(env["WRENN_API_KEY"]))
	if err != nil {
		return
	}
	if _, err := c.Ready(ctx); err != nil {
		cp.Note = "not ready: " + err.Error()
		return
	}
	cp.Healthy = true
	id, err := os.ReadFile(s.path("run", "host-id"))
	if err != nil {
		return
	}
	if _, err := c.Login(ctx, env["WRENN_ADMIN_EMAIL"], env["WRENN_ADMIN_PASSWORD"]); err != nil {
		cp.Note = "the admin cannot log in: run `wrenn up`"
		return
	}
	h, err := c.Host(ctx, string(id))
	if err != nil {
		agent.Note = err.Error()
		return
	}
	agent.Healthy = agent.Running && h.Status == "online"
	agent.Note = fmt.Sprintf("%s, %s, %d sandboxes", h.Status, describeHost(h), h.Sandboxes)
}

// residentMB is the resident memory of a process.
func residentMB(pid int) int {
	f, err := os.Open(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), "VmRSS:"); ok {
			kb, _ := strconv.Atoi(strings.Fields(rest)[0])
			return kb >> 10
		}
	}
	return 0
}
