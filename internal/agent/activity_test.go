package agent

import (
	"testing"
	"testing/synctest"
	"time"
)

// A pause waits for what has just come, until it ends or has become old; not for what is open for long.
func TestDrain(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		age, lasts, want time.Duration // when the pause begins; from then on
	}{
		"short":   {10 * time.Millisecond, 30 * time.Millisecond, 30 * time.Millisecond},
		"long":    {10 * time.Millisecond, time.Hour, youngLimit - 10*time.Millisecond},
		"old":     {2 * time.Second, time.Hour, 0},
		"no more": {10 * time.Millisecond, 0, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			var a activity
			end := a.begin()
			time.Sleep(tc.age)
			if tc.lasts == 0 {
				end()
			} else {
				defer time.AfterFunc(tc.lasts, end).Stop()
			}
			began := time.Now()
			a.drain(t.Context())
			if took := time.Since(began); took != tc.want {
				t.Errorf("%s: it waited %v, want %v", name, took, tc.want)
			}
			if open, _ := a.state(); open != (tc.lasts == time.Hour) {
				t.Errorf("%s: open %v", name, open)
			}
		})
	}
}
