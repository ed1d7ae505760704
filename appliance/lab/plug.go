package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// Plug plugs a drive into the running machine: a USB stick, or, for systems that know no USB, a SCSI disk. It is there until it is pulled out.
func (m *Machine) Plug(ctx context.Context, disk string, usb bool) (pull func(context.Context) error, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("plugging in %s: %w", disk, err)
		}
	}()
	const device, node = "plugged", "plugged-node"
	driver, bus := "scsi-hd", "scsi.0"
	if usb {
		driver, bus = "usb-storage", "usb.0"
	}
	err = m.control(ctx, func(q *qmp) error {
		return errors.Join(
			q.execute("blockdev-add", map[string]any{"node-name": node, "driver": "raw", "file": map[string]any{"driver": "file", "filename": disk}}),
			q.execute("device_add", map[string]any{"id": device, "driver": driver, "bus": bus, "drive": node, "removable": true}),
		)
	})
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		err := m.control(ctx, func(q *qmp) error {
			if err := q.execute("device_del", map[string]any{"id": device}); err != nil {
				return err
			}
			if err := q.await("DEVICE_DELETED"); err != nil {
				return err
			}
			return q.execute("blockdev-del", map[string]any{"node-name": node})
		})
		if err != nil {
			return fmt.Errorf("pulling %s out: %w", disk, err)
		}
		return nil
	}, nil
}

// control talks to QEMU. Its replies are few and soon, unless the machine's own system has to agree.
func (m *Machine) control(ctx context.Context, talk func(*qmp) error) error {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", m.monitor)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { c.Close() })()
	q := &qmp{json.NewEncoder(c), json.NewDecoder(c), nil}
	return errors.Join(q.execute("qmp_capabilities", nil), talk(q))
}

// qmp is a conversation with QEMU, in its machine protocol (docs/interop/qmp-spec.rst).
type qmp struct {
	*json.Encoder
	*json.Decoder
	happened []string // events that nobody awaited yet
}

type qmpMessage struct {
	Return json.RawMessage
	Error  *struct{ Desc string }
	Event  string
}

func (q *qmp) execute(command string, arguments map[string]any) error {
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	if err := q.Encode(request); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	for {
		var m qmpMessage
		switch err := q.Decode(&m); {
		case err != nil:
			return fmt.Errorf("%s: %w", command, err)
		case m.Error != nil:
			return fmt.Errorf("%s: %s", command, m.Error.Desc)
		case m.Return != nil:
			return nil
		case m.Event != "":
			q.happened = append(q.happened, m.Event)
		}
	}
}

func (q *qmp) await(event string) error {
	for {
		for i, e := range q.happened {
			if e == event {
				q.happened = q.happened[i+1:]
				return nil
			}
		}
		var m qmpMessage
		if err := q.Decode(&m); err != nil {
			return fmt.Errorf("awaiting %s: %w", event, err)
		}
		q.happened = append(q.happened, m.Event)
	}
}
