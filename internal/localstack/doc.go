// Package localstack runs Wrenn on one machine: private PostgreSQL and Redis servers, wrenn-cp and
// wrenn-agent, as daemons that outlive the caller and are found again by pid and start time. All it
// keeps is below one directory. It starts the same programs a fleet runs and speaks to them only
// through their public interfaces; it must not import the control plane or the agent.
//
//	Dir/postgres  Dir/redis   data directories, passwords, pid files
//	Dir/logs      Dir/run     output and pid files of the daemons
//	Dir/env       Dir/secrets what a user needs, what the servers need (both 0600)
package localstack
