package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

// redrawPause keeps a busy server from making the screen flicker, and the tool from asking more than four times a
// second.
const redrawPause = 250 * time.Millisecond

// view is an answer in its three forms.
type view struct {
	doc proto.Message
	// table shows it to a person.
	table func(p *render.Page)
	// note goes to standard error with the table, e.g. how to see more.
	note string
}

// show prints a view in the format asked for.
func (a *App) show(v view) error {
	text, err := a.text(v)
	if err != nil {
		return err
	}
	if _, err := a.Out.Write(text); err != nil {
		return fmt.Errorf("the answer cannot be written: %w; check where standard output goes", err)
	}
	if v.note != "" && a.flags.format == "table" {
		fmt.Fprintln(a.Err, render.Clean(v.note))
	}
	return nil
}

func (a *App) text(v view) ([]byte, error) {
	switch a.flags.format {
	case "json":
		return render.JSON(v.doc)
	case "yaml":
		return render.YAML(v.doc)
	}
	p := &render.Page{Colour: a.Terminal && a.Env("NO_COLOR") == "" && a.Env("TERM") != "dumb"}
	v.table(p)
	return []byte(p.String()), nil
}

// source reads from the server what a command shows.
type source func(ctx context.Context) (view, error)

// present shows a source once, or again after every change until it is interrupted.
func (a *App) present(ctx context.Context, c *client.Client, w *watchFlag, read source) error {
	if !w.on {
		v, err := read(ctx)
		if err != nil {
			return err
		}
		return a.show(v)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	feed := c.Watch(ctx, a.Clock, w.kinds, w.id)
	for drawn := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case _, open := <-feed.C:
			if !open {
				return feed.Err()
			}
		}
		if lost := feed.Lost(); lost != nil {
			fmt.Fprintf(a.Err, "certmesh: the connection is lost, what is shown may be old; trying again (%s)\n", a.line(ctx, lost))
			continue
		}
		v, err := read(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		// The feed will tell when the server is back.
		case client.Code(err) == codes.Unavailable && drawn > 0:
			continue
		case err != nil:
			return err
		}
		if err := a.redraw(v, drawn); err != nil {
			return err
		}
		drawn++
		select {
		case <-ctx.Done():
			return nil
		case <-a.Clock.After(redrawPause):
		}
	}
}

// redraw shows a view over the last one on a terminal, and after it anywhere else.
func (a *App) redraw(v view, drawn int) error {
	switch {
	case a.Terminal && a.Env("TERM") != "dumb":
		fmt.Fprint(a.Out, "\x1b[H\x1b[2J\x1b[3J")
	case drawn > 0 && a.flags.format == "table":
		fmt.Fprintln(a.Out)
	case drawn > 0 && a.flags.format == "yaml":
		fmt.Fprintln(a.Out, "---")
	}
	return a.show(v)
}

// watchFlag is --watch, with what its command looks at.
type watchFlag struct {
	on    bool
	kinds []string
	id    string
}

func watching(cmd *cobra.Command, kinds ...string) *watchFlag {
	w := &watchFlag{kinds: kinds}
	cmd.Flags().BoolVar(&w.on, "watch", false, "show it again after every change, until interrupted")
	return w
}
