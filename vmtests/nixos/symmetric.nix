# Direct flows have the box's address, and their replies come back through it: also past a router that drops half-seen connections.
{
  box.services.sidegate.settings.return_path = "symmetric";
  script = ''
    router.succeed("nft add table inet stateful '{ chain forward { type filter hook forward priority 0; ct state invalid drop; }; }'")
    assert asked(7) == "192.168.0.2"
    assert asked(8) == "203.0.113.20"
  '';
}
