# The NixOS firewall filters what is forwarded, and lets pass what the gateway has decided.
{
  box.networking.firewall.filterForward = true;
  script = "decides()";
}
