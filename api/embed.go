// Package api is the folder of hand-written contracts. In Go it offers only the text of openapi.yaml, for
// the control plane to serve and to validate requests against.
package api

import _ "embed"

// OpenAPI is openapi.yaml.
//
//go:embed openapi.yaml
var OpenAPI []byte
