package doctor

// checks are in the order in which findings are told: what the box is, then what is around it.
var checks = []Check{
	{"interface", "whether the LAN interfaces are there and up", interfaces},
	{"kernel-parameter", "the kernel parameters that a gateway needs (sidegate sysctls)", parameters},
	{"gateway", "what the running gateway says of itself", gatewayProblems},
}
