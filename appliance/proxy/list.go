package proxy

// list is a doubly linked list through nodes inside its members, most recently used first. The zero
// value is empty.
type list[T any] struct {
	first, last *node[T]
	length      int
}

// node is a member's place in one list.
type node[T any] struct {
	of         *T
	prev, next *node[T]
	list       *list[T]
}

// push puts a member in front.
func (l *list[T]) push(n *node[T], of *T) {
	n.of, n.list = of, l
	n.prev, n.next = nil, l.first
	if l.first != nil {
		l.first.prev = n
	} else {
		l.last = n
	}
	l.first = n
	l.length++
}

// touch moves a member to the front.
func (n *node[T]) touch() {
	if l := n.list; l.first != n {
		n.leave()
		l.push(n, n.of)
	}
}

// leave takes a member out; a second time does nothing.
func (n *node[T]) leave() {
	l := n.list
	if l == nil {
		return
	}
	if n.prev != nil {
		n.prev.next = n.next
	} else {
		l.first = n.next
	}
	if n.next != nil {
		n.next.prev = n.prev
	} else {
		l.last = n.prev
	}
	n.prev, n.next, n.list = nil, nil, nil
	l.length--
}

// oldest is the least recently used member, nil if there is none.
func (l *list[T]) oldest() *T {
	if l.last == nil {
		return nil
	}
	return l.last.of
}
