package datapath

// MarkOwn is the firewall mark (SO_MARK) of the daemon's own sockets, which are never steered.
const MarkOwn = int(gatewayMarkMARK_OWN)
