// Package version holds the version that the build stamped into the program.
package version

// Version is set by the linker (see Makefile).
var Version = "dev"
