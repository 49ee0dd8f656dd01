package api

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/getkin/kin-openapi/openapi3"

	contract "github.com/wrenn-sandbox/wrenn/api"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// bodyTimeout is how long the body of an ordinary request may take to arrive.
const bodyTimeout = 30 * time.Second

// spec is openapi.yaml, to check requests against and to show.
type spec struct {
	doc  *openapi3.T
	html []byte
}

func loadSpec() (*spec, error) {
	doc, err := openapi3.NewLoader().LoadFromData(contract.OpenAPI)
	if err != nil {
		return nil, fmt.Errorf("openapi.yaml: %w", err)
	}
	if err := doc.Validate(context.Background()); err != nil {
		return nil, fmt.Errorf("openapi.yaml: %w", err)
	}
	html, err := renderDocs(doc)
	if err != nil {
		return nil, err
	}
	return &spec{doc, html}, nil
}

// operation checks the requests of one route. A query parameter that the contract does not name is
// refused like an unknown field: a misspelt filter must not silently match everything.
type operation struct {
	query    map[string]*openapi3.Parameter
	numbers  []*openapi3.Parameter // in the path; ids there are looked up as they are
	headers  []*openapi3.Parameter
	body     *openapi3.Schema // nil: none, or streamed
	required bool
}

func (sp *spec) operation(rt route) (*operation, error) {
	item := sp.doc.Paths.Find(rt.path)
	if item == nil || item.GetOperation(rt.method) == nil {
		return nil, fmt.Errorf("openapi.yaml does not describe %s %s", rt.method, rt.path)
	}
	raw := item.GetOperation(rt.method)
	op := &operation{query: map[string]*openapi3.Parameter{}}
	for _, p := range slices.Concat(item.Parameters, raw.Parameters) {
		switch p.Value.In {
		case openapi3.ParameterInQuery:
			op.query[p.Value.Name] = p.Value
		case openapi3.ParameterInPath:
			if p.Value.Schema.Value.Type.Is("integer") {
				op.numbers = append(op.numbers, p.Value)
			}
		case openapi3.ParameterInHeader:
			op.headers = append(op.headers, p.Value)
		}
	}
	if raw.RequestBody != nil {
		if media := raw.RequestBody.Value.Content.Get("application/json"); media != nil {
			op.body, op.required = media.Schema.Value, raw.RequestBody.Value.Required
		}
	}
	return op, nil
}

// check refuses what the contract does not allow, before the handler sees it.
func (op *operation) check(w http.ResponseWriter, r *http.Request, limit int64) error {
	if err := checkText("the path", r.URL.Path); err != nil {
		return notFound("route; see /docs")
	}
	if err := op.checkQuery(r); err != nil {
		return err
	}
	for _, p := range op.numbers {
		if err := checkParam(p, []string{r.PathValue(p.Name)}); err != nil {
			return err
		}
	}
	for _, p := range op.headers {
		if v := r.Header.Get(p.Name); v != "" {
			if err := checkParam(p, []string{v}); err != nil {
				return err
			}
		}
	}
	if limit == noLimit {
		return nil
	}
	return op.checkBody(w, r, limit)
}

func (op *operation) checkQuery(r *http.Request) error {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return wrenn.Wrap(err, wrenn.KindInvalidRequest, "the query string is malformed").With("field", "query")
	}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		p, ok := op.query[name]
		if !ok {
			return invalid(name, "there is no such query parameter here; there are: %s", strings.Join(slices.Sorted(maps.Keys(op.query)), ", "))
		}
		if err := checkParam(p, values[name]); err != nil {
			return err
		}
	}
	for name, p := range op.query {
		if _, ok := values[name]; p.Required && !ok {
			return invalid(name, "the query parameter is missing")
		}
	}
	return nil
}

// checkParam holds the values of a parameter against its schema.
func checkParam(p *openapi3.Parameter, values []string) error {
	for _, v := range values {
		if err := checkText(p.Name, v); err != nil {
			return err
		}
	}
	schema := p.Schema.Value
	if schema.Type.Is("array") {
		items := make([]any, len(values))
		for i, v := range values {
			items[i] = v
		}
		return visit(p.Name, schema, items)
	}
	if len(values) > 1 {
		return invalid(p.Name, "is given %d times", len(values))
	}
	var value any = values[0]
	switch {
	case schema.Type.Is("integer"), schema.Type.Is("number"):
		n, err := strconv.ParseInt(values[0], 10, 64)
		if err != nil {
			return invalid(p.Name, "must be a whole number")
		}
		value = float64(n)
	case schema.Type.Is("boolean"):
		b, err := strconv.ParseBool(values[0])
		if err != nil {
			return invalid(p.Name, "must be true or false")
		}
		value = b
	}
	return visit(p.Name, schema, value)
}

func (op *operation) checkBody(w http.ResponseWriter, r *http.Request, limit int64) error {
	if limit == 0 {
		limit = jsonBody
	}
	text, err := readBody(w, r, limit)
	if err != nil {
		return err
	}
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(text)), int64(len(text))
	if len(bytes.TrimSpace(text)) == 0 {
		if op.required {
			return wrenn.Errorf(wrenn.KindInvalidRequest, "the request needs a JSON body").With("field", "body")
		}
		r.Body = http.NoBody
		return nil
	}
	if op.body == nil {
		return nil // such as `curl -d ''` on a route without one
	}
	if ct := r.Header.Get("Content-Type"); ct != "" {
		if media, _, err := mime.ParseMediaType(ct); err != nil || media != "application/json" {
			return wrenn.Errorf(wrenn.KindInvalidRequest, "Content-Type must be application/json").With("field", "Content-Type")
		}
	}
	value, err := decode(text)
	if err != nil {
		return err
	}
	return visit("", op.body, value)
}

func readBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return nil, nil
	}
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Now().Add(bodyTimeout)) // not every connection has deadlines
	defer func() { _ = rc.SetReadDeadline(time.Time{}) }()
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return nil, wrenn.Errorf(wrenn.KindTooLarge, "the request body is larger than %d bytes", limit).With("limit_bytes", limit)
	case err != nil:
		return nil, wrenn.Wrap(err, wrenn.KindInvalidRequest, "the request body could not be read").With("field", "body")
	}
	return text, nil
}

// decode reads one JSON value and refuses what no field may carry: text that is not UTF-8, and NUL.
func decode(text []byte) (any, error) {
	if !utf8.Valid(text) {
		return nil, wrenn.Errorf(wrenn.KindInvalidRequest, "the request body is not valid UTF-8").With("field", "body")
	}
	var value any
	if err := json.Unmarshal(text, &value); err != nil {
		return nil, badRequest(err)
	}
	if path, ok := findNUL(value); ok {
		return nil, invalid(cmp.Or(path, "body"), "contains a NUL character")
	}
	return value, nil
}

func findNUL(v any) (string, bool) {
	switch v := v.(type) {
	case string:
		return "", strings.ContainsRune(v, 0)
	case []any:
		for i, e := range v {
			if path, ok := findNUL(e); ok {
				return join(strconv.Itoa(i), path), true
			}
		}
	case map[string]any:
		for k, e := range v {
			if strings.ContainsRune(k, 0) {
				return "", true
			}
			if path, ok := findNUL(e); ok {
				return join(k, path), true
			}
		}
	}
	return "", false
}

func join(head, tail string) string {
	if tail == "" {
		return head
	}
	return head + "." + tail
}

func checkText(name, v string) error {
	if !utf8.ValidString(v) || strings.ContainsRune(v, 0) {
		return invalid(name, "is not valid UTF-8 text or contains NUL")
	}
	return nil
}

// visit holds a value against a schema; the error names the field.
func visit(name string, schema *openapi3.Schema, value any) error {
	err := schema.VisitJSON(value)
	if err == nil {
		return nil
	}
	var inner, se *openapi3.SchemaError
	for errors.As(err, &se) { // of nested complaints the innermost says what is wrong
		inner, err = se, se.Origin
	}
	var path []string
	if name != "" {
		path = append(path, name)
	}
	reason := "is not what the API takes"
	if inner != nil {
		path, reason = describe(inner, append(path, inner.JSONPointer()...))
	}
	field := strings.Join(path, ".")
	if field == "" {
		field = "body"
	}
	return invalid(field, "%s", reason)
}

// describe turns a schema's complaint into words for a user. A missing or unknown property is named as
// the field.
func describe(se *openapi3.SchemaError, path []string) ([]string, string) {
	quoted := func() string {
		if _, rest, ok := strings.Cut(se.Reason, `"`); ok {
			if i := strings.LastIndex(rest, `"`); i >= 0 {
				return rest[:i]
			}
		}
		return ""
	}
	add := func(p string) []string {
		if len(path) > 0 && path[len(path)-1] == p {
			return path
		}
		return append(path, p)
	}
	switch {
	case strings.HasSuffix(se.Reason, "is unsupported"):
		return add(quoted()), "there is no such field"
	case strings.HasSuffix(se.Reason, "is missing"):
		return add(quoted()), "is missing"
	case se.SchemaField == "pattern":
		return path, "must match " + se.Schema.Pattern
	case se.SchemaField == "nullable":
		return path, "must not be null"
	}
	return path, se.Reason
}

// badRequest is for what the decoders refuse.
func badRequest(err error) error {
	var own *wrenn.Error
	var syntax *json.SyntaxError
	var typ *json.UnmarshalTypeError
	switch {
	case errors.As(err, &own):
		return own
	case errors.As(err, &syntax):
		return wrenn.Wrap(err, wrenn.KindInvalidRequest, "the request body is not valid JSON (at byte %d)", syntax.Offset).With("field", "body")
	case errors.As(err, &typ):
		return wrenn.Wrap(err, wrenn.KindInvalidRequest, "%s: must not be %s", cmp.Or(typ.Field, "body"), typ.Value).With("field", cmp.Or(typ.Field, "body"))
	default:
		return wrenn.Wrap(err, wrenn.KindInvalidRequest, "the request cannot be read")
	}
}
