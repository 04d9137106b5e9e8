package render

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf16"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// JSON is m with the names of the protocol and zero values present, in the order of the fields, always in the same
// bytes. Characters that a terminal would act on are escaped, so that nothing is lost and nothing happens.
func JSON(m proto.Message) ([]byte, error) {
	doc, err := document(m)
	if err != nil {
		return nil, fmt.Errorf("the answer cannot be written as JSON: %w", err)
	}
	return escape(doc, func(r rune) string {
		var s strings.Builder
		for _, u := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(&s, `\u%04x`, u)
		}
		return s.String()
	}), nil
}

func document(m proto.Message) ([]byte, error) {
	raw, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	// protojson varies its blanks on purpose; indenting anew makes them the same.
	if err := json.Indent(&b, raw, "", "  "); err != nil {
		return nil, err
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}

// escape replaces unsafe characters. Both notations have them inside of quoted strings only, but for line breaks.
func escape(in []byte, with func(rune) string) []byte {
	if !bytes.ContainsFunc(in, escaped) {
		return in
	}
	var b bytes.Buffer
	for _, r := range string(in) {
		if escaped(r) {
			b.WriteString(with(r))
			continue
		}
		b.WriteRune(r)
	}
	return b.Bytes()
}

func escaped(r rune) bool { return r != '\n' && unsafe(r) }

// YAML is the tree of JSON, in YAML.
func YAML(m proto.Message) ([]byte, error) {
	doc, err := document(m)
	if err != nil {
		return nil, fmt.Errorf("the answer cannot be written as YAML: %w", err)
	}
	// JSON is YAML already, but for its pairs of escapes beyond 16 bits; only the style changes, so the order stays.
	var root yaml.Node
	if err := yaml.Unmarshal(escape(doc, yamlEscape), &root); err != nil {
		return nil, fmt.Errorf("the answer cannot be written as YAML: %w", err)
	}
	restyle(&root)
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(&root); err != nil {
		return nil, fmt.Errorf("the answer cannot be written as YAML: %w", err)
	}
	return escape(b.Bytes(), yamlEscape), nil
}

func yamlEscape(r rune) string { return fmt.Sprintf(`\U%08x`, r) }

func restyle(n *yaml.Node) {
	empty := len(n.Content) == 0 && (n.Kind == yaml.MappingNode || n.Kind == yaml.SequenceNode)
	if !empty {
		n.Style = 0
	}
	if n.Kind == yaml.ScalarNode && n.Tag == "!!str" && strings.ContainsFunc(n.Value, escaped) {
		n.Style = yaml.DoubleQuotedStyle
	}
	for _, c := range n.Content {
		restyle(c)
	}
}
