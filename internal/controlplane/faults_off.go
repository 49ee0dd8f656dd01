//go:build !faults

package controlplane

// faults is where tests make the process end: only in a program built for that, with -tags faults.
func faults() func(point string) { return nil }
