# The box's own programs follow the rules, too.
{
  box.services.sidegate.settings.gateway.local = true;
  script = ''
    decides()
    assert box.succeed("curl -sS --max-time 20 http://203.0.113.10:8/").strip() == "203.0.113.20"
    assert box.succeed("curl -sS --max-time 20 http://203.0.113.10:7/").strip() == "192.168.0.2"
    box.fail("curl -sS --max-time 3 http://203.0.113.10:9/")
  '';
}
