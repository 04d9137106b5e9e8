package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

const (
	maxPage = 1000
	// bigPage is what --all asks for at once.
	bigPage = 500
	// maxPages bounds --all: five million rows.
	maxPages = 10_000
)

// pageFlags are the flags of every list.
type pageFlags struct {
	cmd    *cobra.Command
	size   int
	cursor string
	all    bool
}

func paging(cmd *cobra.Command) *pageFlags {
	p := &pageFlags{cmd: cmd}
	f := cmd.Flags()
	f.IntVar(&p.size, "page-size", 50, "rows of one page, `1..1000`")
	f.StringVar(&p.cursor, "cursor", "", "`CURSOR` that the page before ended with")
	f.BoolVar(&p.all, "all", false, "fetch every page")
	cmd.PreRunE = func(*cobra.Command, []string) error { return p.check() }
	return p
}

func (p *pageFlags) check() error {
	if p.size < 1 || p.size > maxPage {
		return misuse("--page-size %d is not a page size; use 1 to %d, and --all or --cursor for more", p.size, maxPage)
	}
	return nil
}

// page is the first request.
func (p *pageFlags) page() *operatorpb.Page {
	size := p.size
	if p.all && !p.cmd.Flags().Changed("page-size") {
		size = bigPage
	}
	return &operatorpb.Page{Size: int32(size), Cursor: p.cursor}
}

// more tells a person how to go on.
func (p *pageFlags) more(cursor string) string {
	if cursor == "" {
		return ""
	}
	return fmt.Sprintf("There are more: repeat with --cursor %s, or with --all.", cursor)
}

// listed is any answer that has pages.
type listed interface {
	proto.Message
	GetNextCursor() string
}

// collect fetches one page, or with --all every page as if it were one.
func collect[T listed](ctx context.Context, p *pageFlags, fetch func(context.Context, *operatorpb.Page) (T, error)) (T, error) {
	var none T
	page := p.page()
	out, err := fetch(ctx, page)
	if err != nil || !p.all {
		return out, err
	}
	for n, cursor := 1, out.GetNextCursor(); cursor != ""; n++ {
		if n == maxPages || cursor == page.GetCursor() {
			return none, errors.New("the server's list does not end; narrow it by its flags")
		}
		page = &operatorpb.Page{Size: page.GetSize(), Cursor: cursor}
		next, err := fetch(ctx, page)
		if err != nil {
			return none, err
		}
		cursor = next.GetNextCursor()
		proto.Merge(out, next)
	}
	m := out.ProtoReflect()
	m.Clear(m.Descriptor().Fields().ByName("next_cursor"))
	return out, nil
}

// empty is what a person reads where a list has no rows.
func empty(n int, what string) string {
	if n > 0 {
		return ""
	}
	return "There are no " + what + "."
}

// notes joins what there is to say.
func notes(lines ...string) string {
	var said []string
	for _, l := range lines {
		if l != "" {
			said = append(said, l)
		}
	}
	return strings.Join(said, " ")
}
