"""A ROS 2 node around an engine. Only `quantvla.runtime.ros2.node` imports rclpy, which comes with ROS."""
