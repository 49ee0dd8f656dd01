// Package wrenn is the domain: the nouns every program speaks of (sandbox, host, template), their
// states, their ids and the kinds of error. It imports only the standard library and knows nothing
// of HTTP, SQL, RPC or hypervisors.
package wrenn
