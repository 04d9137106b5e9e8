package fresh

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bufbuild/protocompile"
	"github.com/bufbuild/protocompile/protoutil"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"
)

// protocolDir is the root of the proto files, seen from this package.
const protocolDir = "../../protocol"

func TestGeneratedCodeIsFresh(t *testing.T) {
	t.Parallel()
	sources, committed := list(t, os.DirFS(protocolDir))
	if len(sources) == 0 {
		t.Fatalf("no .proto file below %s", protocolDir)
	}
	request := compile(t, sources)

	generated := map[string]string{}
	for _, generator := range []string{"protoc-gen-go", "protoc-gen-go-grpc"} {
		for _, file := range generate(t, generator, request).GetFile() {
			generated[file.GetName()] = file.GetContent()
		}
	}
	for name, want := range generated {
		got, err := os.ReadFile(filepath.Join(protocolDir, name))
		if err != nil {
			t.Errorf("protocol/%s is missing: run `make generate` and commit it", name)
			continue
		}
		if string(got) != want {
			t.Errorf("protocol/%s is stale (%s): run `make generate` and commit it", name, firstDifference(string(got), want))
		}
	}
	for _, name := range committed {
		if _, ok := generated[name]; !ok {
			t.Errorf("protocol/%s is generated from no .proto file: delete it", name)
		}
	}
}

// list returns the proto sources and the committed generated files, by their paths below the root.
func list(t *testing.T, root fs.FS) (sources, committed []string) {
	t.Helper()
	err := fs.WalkDir(root, ".", func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir():
		case strings.HasSuffix(path, ".proto"):
			sources = append(sources, path)
		case strings.HasSuffix(path, ".pb.go"):
			committed = append(committed, path)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("walk the protocol folder: %v", err)
	}
	return sources, committed
}

// compile builds the request that protoc would hand to a generator.
func compile(t *testing.T, sources []string) *pluginpb.CodeGeneratorRequest {
	t.Helper()
	compiler := protocompile.Compiler{
		Resolver:       protocompile.WithStandardImports(&protocompile.SourceResolver{ImportPaths: []string{protocolDir}}),
		SourceInfoMode: protocompile.SourceInfoStandard,
	}
	files, err := compiler.Compile(t.Context(), sources...)
	if err != nil {
		t.Fatalf("compile the proto files: %v", err)
	}
	request := &pluginpb.CodeGeneratorRequest{FileToGenerate: sources, Parameter: new("paths=source_relative")}
	seen := map[string]bool{}
	// A generator wants every import before the file that imports it.
	var add func(file protoreflect.FileDescriptor)
	add = func(file protoreflect.FileDescriptor) {
		if seen[file.Path()] {
			return
		}
		seen[file.Path()] = true
		for i := range file.Imports().Len() {
			add(file.Imports().Get(i).FileDescriptor)
		}
		descriptor := protoutil.ProtoFromFileDescriptor(file)
		if !slices.Contains(sources, file.Path()) {
			descriptor = proto.Clone(descriptor).(*descriptorpb.FileDescriptorProto)
			descriptor.SourceCodeInfo = nil
		}
		request.ProtoFile = append(request.ProtoFile, descriptor)
	}
	for _, file := range files {
		add(file)
	}
	return request
}

// generate runs one of the generators pinned in tools/go.mod.
func generate(t *testing.T, generator string, request *pluginpb.CodeGeneratorRequest) *pluginpb.CodeGeneratorResponse {
	t.Helper()
	input, err := proto.Marshal(request)
	if err != nil {
		t.Fatalf("encode the request for %s: %v", generator, err)
	}
	var stdout, stderr bytes.Buffer
	command := exec.CommandContext(t.Context(), "go", "tool", generator)
	command.Stdin, command.Stdout, command.Stderr = bytes.NewReader(input), &stdout, &stderr
	if err := command.Run(); err != nil {
		t.Fatalf("run %s: %v\n%s", generator, err, stderr.String())
	}
	response := new(pluginpb.CodeGeneratorResponse)
	if err := proto.Unmarshal(stdout.Bytes(), response); err != nil {
		t.Fatalf("decode the answer of %s: %v", generator, err)
	}
	if response.Error != nil {
		t.Fatalf("%s: %s", generator, response.GetError())
	}
	return response
}

// firstDifference shows the first line that differs.
func firstDifference(got, want string) string {
	gotLines, wantLines := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range min(len(gotLines), len(wantLines)) {
		if gotLines[i] != wantLines[i] {
			return "committed: " + strings.TrimSpace(gotLines[i]) + "; generated: " + strings.TrimSpace(wantLines[i])
		}
	}
	return "one of the two is longer"
}
