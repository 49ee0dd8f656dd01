package api

import (
	"bytes"
	_ "embed"
	"fmt"
	"html/template"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/getkin/kin-openapi/openapi3"
)

//go:embed docs.html
var docsHTML string

// The reference page: openapi.yaml as one self-contained HTML document.
type (
	docsPage struct {
		Title, Version string
		Intro          template.HTML
		Groups         []docsGroup
		Schemas        []docsSchema
	}
	docsGroup struct {
		Name, Text string
		Operations []docsOperation
	}
	docsOperation struct {
		ID, Method, Path, Summary string
		Text                      template.HTML
		Auth                      string
		Params                    []docsField
		Body, Client, Server      string // names of schemas
		Media                     string // of a body that has none
		Answers                   []docsAnswer
	}
	docsAnswer struct{ Status, Text, Schema string }
	docsSchema struct {
		Name   string
		Text   template.HTML
		Kind   string
		Fields []docsField
	}
	docsField struct {
		Name, In, Kind, Ref string
		Required            bool
		Text                template.HTML
	}
)

func renderDocs(doc *openapi3.T) ([]byte, error) {
	tmpl, err := template.New("docs").Parse(docsHTML)
	if err != nil {
		return nil, err
	}
	page := docsPage{Title: doc.Info.Title, Version: doc.Info.Version, Intro: markdown(doc.Info.Description)}
	for _, tag := range doc.Tags {
		g := docsGroup{Name: tag.Name, Text: tag.Description}
		for _, path := range doc.Paths.InMatchingOrder() {
			item := doc.Paths.Find(path)
			for _, method := range []string{"GET", "POST", "PUT", "DELETE"} {
				if op := item.GetOperation(method); op != nil && slices.Contains(op.Tags, tag.Name) {
					g.Operations = append(g.Operations, docsOp(doc, method, path, item, op))
				}
			}
		}
		slices.SortStableFunc(g.Operations, func(a, b docsOperation) int { return strings.Compare(a.Path, b.Path) })
		page.Groups = append(page.Groups, g)
	}
	for _, name := range slices.Sorted(maps.Keys(doc.Components.Schemas)) {
		if s := doc.Components.Schemas[name].Value; s.Type.Is("object") {
			page.Schemas = append(page.Schemas, docsSchema{name, markdown(s.Description), kindOf(s), fields(s)})
		}
	}
	var out bytes.Buffer
	err = tmpl.Execute(&out, page)
	return out.Bytes(), err
}

func docsOp(doc *openapi3.T, method, path string, item *openapi3.PathItem, op *openapi3.Operation) docsOperation {
	d := docsOperation{ID: op.OperationID, Method: method, Path: path, Summary: op.Summary, Text: markdown(op.Description), Auth: authOf(doc, op)}
	for _, p := range slices.Concat(item.Parameters, op.Parameters) {
		d.Params = append(d.Params, docsField{
			Name: p.Value.Name, In: p.Value.In, Kind: kindOf(p.Value.Schema.Value), Required: p.Value.Required, Text: markdown(p.Value.Description),
		})
	}
	if op.RequestBody != nil {
		for media, m := range op.RequestBody.Value.Content {
			if d.Body = refName(m.Schema); d.Body == "" {
				d.Media = media
			}
		}
	}
	if ws, ok := op.Extensions["x-websocket"].(map[string]any); ok {
		d.Client, _ = ws["client"].(string)
		d.Server, _ = ws["server"].(string)
	}
	for _, status := range slices.Sorted(maps.Keys(op.Responses.Map())) {
		if status == "default" {
			continue
		}
		res := op.Responses.Value(status).Value
		a := docsAnswer{Status: status}
		if res.Description != nil {
			a.Text = *res.Description
		}
		for _, m := range res.Content {
			a.Schema = refName(m.Schema)
		}
		d.Answers = append(d.Answers, a)
	}
	return d
}

func authOf(doc *openapi3.T, op *openapi3.Operation) string {
	reqs := doc.Security
	if op.Security != nil {
		reqs = *op.Security
	}
	names := map[string]string{"ApiKey": "API key", "Bearer": "user token", "HostToken": "host token"}
	var out []string
	for _, r := range reqs {
		for name := range r {
			out = append(out, names[name])
		}
	}
	if len(out) == 0 {
		return "no credentials"
	}
	return strings.Join(out, " or ")
}

func fields(s *openapi3.Schema) []docsField {
	var out []docsField
	for _, name := range slices.Sorted(maps.Keys(s.Properties)) {
		p := s.Properties[name]
		out = append(out, docsField{
			Name: name, Kind: kindOf(p.Value), Ref: linked(p), Required: slices.Contains(s.Required, name), Text: markdown(p.Value.Description),
		})
	}
	slices.SortStableFunc(out, func(a, b docsField) int {
		switch {
		case a.Required == b.Required:
			return 0
		case a.Required:
			return -1
		}
		return 1
	})
	return out
}

// linked is the schema of an object that a property leads to.
func linked(p *openapi3.SchemaRef) string {
	for _, c := range slices.Concat([]*openapi3.SchemaRef{p, p.Value.Items}, p.Value.AllOf) {
		if c != nil && c.Ref != "" && c.Value.Type.Is("object") {
			return refName(c)
		}
	}
	return ""
}

func refName(s *openapi3.SchemaRef) string {
	if s == nil {
		return ""
	}
	return strings.TrimPrefix(s.Ref, "#/components/schemas/")
}

// kindOf says in few words what a value may be.
func kindOf(s *openapi3.Schema) string {
	def := s.Default
	if len(s.AllOf) == 1 {
		s = s.AllOf[0].Value
	}
	var out []string
	switch {
	case len(s.Enum) > 0:
		for _, e := range s.Enum {
			out = append(out, fmt.Sprint(e))
		}
		out = []string{strings.Join(out, " | ")}
	case s.Type.Is("array"):
		out = append(out, "list of "+kindOf(s.Items.Value))
	case s.Format == "date-time":
		out = append(out, "time")
	default:
		out = append(out, strings.Join(s.Type.Slice(), " | "))
	}
	if s.Min != nil && s.Max != nil {
		out = append(out, fmt.Sprintf("%.0f to %.0f", *s.Min, *s.Max))
	}
	if s.MaxLength != nil {
		out = append(out, fmt.Sprintf("%d to %d characters", s.MinLength, *s.MaxLength))
	}
	if s.MaxItems != nil {
		out = append(out, fmt.Sprintf("at most %d", *s.MaxItems))
	}
	if s.Pattern != "" {
		out = append(out, s.Pattern)
	}
	if def != nil {
		out = append(out, fmt.Sprintf("default %v", def))
	}
	return strings.Join(out, ", ")
}

var (
	mdCode = regexp.MustCompile("`([^`]+)`")
	mdBold = regexp.MustCompile(`\*\*([^*]+)\*\*`)
)

// markdown renders the little of it that openapi.yaml uses: paragraphs, tables, code and bold.
func markdown(text string) template.HTML {
	var out strings.Builder
	for _, block := range strings.Split(strings.TrimSpace(text), "\n\n") {
		switch block = strings.TrimSpace(block); {
		case block == "":
		case strings.HasPrefix(block, "|"):
			out.WriteString(mdTable(block))
		default:
			out.WriteString("<p>" + mdInline(block) + "</p>")
		}
	}
	return template.HTML(out.String()) //nolint:gosec // every text went through HTMLEscapeString
}

func mdInline(s string) string {
	s = template.HTMLEscapeString(s)
	s = mdCode.ReplaceAllString(s, "<code>$1</code>")
	return mdBold.ReplaceAllString(s, "<strong>$1</strong>")
}

func mdTable(block string) string {
	var out strings.Builder
	out.WriteString("<table>")
	for i, line := range strings.Split(block, "\n") {
		if i == 1 {
			continue // the rule below the head
		}
		cell := "td"
		if i == 0 {
			cell = "th"
		}
		out.WriteString("<tr>")
		for _, c := range strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|") {
			fmt.Fprintf(&out, "<%s>%s</%s>", cell, mdInline(strings.TrimSpace(c)), cell)
		}
		out.WriteString("</tr>")
	}
	return out.String() + "</table>"
}
