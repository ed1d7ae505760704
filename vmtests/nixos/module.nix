# The module as in the README, with a configuration that is not in the store, so that scenarios can have others.
rec {
  config = "/var/lib/scenarios/sidegate.yaml";
  box =
    { place, ... }:
    {
      systemd.tmpfiles.settings.scenarios = {
        "/var/lib/scenarios".d.mode = "0755";
        ${config}.C.argument = "/etc/sidegate/sidegate.json"; # JSON is YAML
      };
      services.sidegate = {
        enable = true;
        lan = { inherit (place) interface address gateway; };
        file = config;
      };
    };
}
