package datapath

// MarkOwn is the firewall mark (SO_MARK) of the daemon's own sockets, which are never steered.
const MarkOwn = int(gatewayMarkMARK_OWN)

// The marks that tell the box's firewall what a packet is, and the bits that they are told by.
const (
	MarkDirect = uint32(gatewayMarkMARK_DIRECT) // forwarded by our verdict
	MarkProxy  = uint32(gatewayMarkMARK_PROXY)  // delivered to the proxy, whatever its destination
	MarkMask   = uint32(gatewayMarkMARK_MASK)
)

// OwnTable is the name of the nftables table that is the datapath's own.
const OwnTable = ownTable
