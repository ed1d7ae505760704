# Direct, proxied and blocked flows; replies of direct ones go past the box.
{
  box = { };
  script = ''
    box.succeed("nft add table inet seen '{ chain in { type filter hook prerouting priority -400; ip saddr 203.0.113.10 tcp sport 7 counter; }; }'")
    decides()
    box.succeed("nft list table inet seen | grep 'packets 0'")
  '';
}
