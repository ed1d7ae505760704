package doctor

// checks are in the order in which findings are told: what the box is, then what is around it.
var checks = []Check{
	{"kernel", "the kernel's version, and whether it describes its types", kernel},
	{"interface", "whether the LAN interfaces are there and up", interfaces},
	{"kernel-parameter", "the kernel parameters that a gateway needs (sidegate sysctls)", parameters},
	{"rp-filter", "strict reverse path filtering on a LAN with two ways", eachLAN(reversePath)},
	{"default-route", "whether there is one", defaultRoute},
	{"router", "whether the box's default router answers", router(false)},
	{"router-ipv6", "whether the box's default router for IPv6 answers", router(true)},
	{"address-lease", "whether clients can rely on the box's address", eachLAN(leased)},
	{"address-duplicate", "whether another host has the box's addresses", eachLAN(duplicates)},
	{"mtu", "whether the LAN interface takes what the LAN carries, and the other way round", eachLAN(packetSize)},
	{"programs", "other BPF programs where the gateway's meet packets", eachLAN(programs)},
	{"firewall-forward", "whether the box's firewall lets direct flows pass", crossings(firewallForward)},
	{"firewall-input", "whether it lets packets come to the proxy", crossings(firewallInput)},
	{"firewall-output", "whether it lets the proxy answer", crossings(firewallOutput)},
	{"firewall-own", "whether it lets the box's own connections come to the proxy by lo, and the answers back", firewallOwn},
	{"firewall-legacy", "whether there are rules that it does not read", legacyFirewall},
	{"masquerade", "whether direct flows are translated against the configuration", crossings(masquerade)},
	{"own-connections", "whether the box's own connections can be decided for", ownConnections},
	{"dhcp", "which gateway and DNS server clients are given", eachLAN(leases)},
	{"router-advertisement", "routers that take clients' IPv6 past the box", eachLAN(advertisements)},
	{"gateway", "what the running gateway says of itself", gatewayProblems},
}
