# A crash, a reload, a restart, a reboot.
{
  box = { };
  script = ''
    decides()
    box.succeed("systemctl kill --signal=KILL sidegate.service")
    assert asked(7) == "192.168.0.3", "a direct flow does not need the daemon"
    box.wait_until_succeeds("sidegate status")
    decides()
    box.succeed("systemctl reload sidegate.service")
    decides()
    box.succeed("systemctl restart sidegate.service")
    decides()
    box.succeed("test $(systemctl show --property=MainPID --value sidegate | xargs ps -o user= -p) = sidegate")
    box.shutdown()
    box.start()
    box.wait_for_unit("sidegate.service")
    decides()
  '';
}
